"""The latest metrics for Prometheus to scrape, on the loopback interface and for holders of a token."""

import hmac
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from megatron_fipo.config.base import ConfigError
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.declaration import Metric, UndeclaredMetric

logger = logging.getLogger(__name__)

TOKEN_FILE = "prometheus_token"
ADDRESS_FILE = "prometheus_address"


class PrometheusSink:
    """Serves `http://127.0.0.1:PORT/metrics`.

    A request needs the header `Authorization: Bearer TOKEN`. The token is made for the run and lies, readable by its
    owner alone, in `prometheus_token` in the run directory (a scrape configuration's `credentials_file`); the URL lies
    in `prometheus_address`.

    Args:
        port: Port to listen on; 0 takes a free one.
        directory: The run directory.

    Raises:
        ConfigError: The port cannot be had.
    """

    name = "Prometheus"

    def __init__(self, port: int, directory: Path) -> None:
        from prometheus_client import CollectorRegistry, make_wsgi_app
        from prometheus_client.exposition import ThreadingWSGIServer

        self._latest: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]
        token = secrets.token_hex(32)
        application = _for_holders_of(token, make_wsgi_app(registry))
        try:
            self._server = make_server("127.0.0.1", port, application, ThreadingWSGIServer, _SilentHandler)
        except OSError as error:
            raise _taken(port, error) from error
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        # A file that is there already may be readable by others; the token goes into a new one.
        (directory / TOKEN_FILE).unlink(missing_ok=True)
        descriptor = os.open(directory / TOKEN_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token)
        (directory / ADDRESS_FILE).write_text(f"{self.url}\n")
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()
        logger.info("Prometheus metrics at %s, token in %s", self.url, directory / TOKEN_FILE)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Replace what is served; metrics that a step lacks keep their last value."""
        self._latest = {**self._latest, **values, "step": float(step)}

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Any]:
        """The latest values as gauges: one for each metric, and one with labels for each family."""
        from prometheus_client.core import GaugeMetricFamily

        gauges: dict[str, Any] = {}
        for key, value in sorted(self._latest.items()):
            metric, labels = _declaration(key)
            if metric.name not in gauges:
                gauges[metric.name] = GaugeMetricFamily(
                    gauge_name(metric.name), metric.description, labels=list(metric.labels)
                )
            gauges[metric.name].add_metric([labels[word] for word in metric.labels], value)
        yield from gauges.values()


def check_port(port: int) -> None:
    """Refuse a port that is taken now, before there is a run.

    Raises:
        ConfigError: It is.
    """
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise _taken(port, error) from error


def _taken(port: int, error: OSError) -> ConfigError:
    return ConfigError(
        field="metrics.prometheus_port",
        value=port,
        rule=f"must be a free port ({os.strerror(error.errno or 0)})",
        way_out="choose another, or 0 for any free one",
    )


def gauge_name(name: str) -> str:
    """Prometheus' name of a metric: `train/loss` is `megatron_fipo_train_loss`."""
    return "megatron_fipo_" + re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_")


def _declaration(key: str) -> tuple[Metric, dict[str, str]]:
    try:
        return CATALOGUE.find(key)
    except UndeclaredMetric:
        return Metric(name=key, description="Not in the catalogue."), {}


def _for_holders_of(token: str, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The application behind a check of the bearer token."""
    wanted = f"Bearer {token}".encode()

    def checked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = environ.get("HTTP_AUTHORIZATION", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(given, wanted):
            return application(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"a bearer token is needed\n"]

    return checked


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for every scrape."""
