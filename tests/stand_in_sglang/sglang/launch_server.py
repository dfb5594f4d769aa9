"""Found first on PYTHONPATH, in the place of an SGLang server: two processes, soon ready, that generate nothing.

The second one does not end with the first, as SGLang's do not while they are young. STAND_IN_FAILS in the environment
ends it, STAND_IN_DELAY_S keeps it from being ready.
"""

import argparse
import http.server
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--base-gpu-id", type=int)
    arguments, _ = parser.parse_known_args()
    key = json.loads(arguments.config.read_text())["api-key"] if arguments.config else None

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            open_to_all = self.path == "/ready" or key is None
            self.send_response(200 if open_to_all or self.headers["Authorization"] == f"Bearer {key}" else 401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"tp_size": arguments.tp_size}).encode())

        def log_message(self, format: str, *values: object) -> None:
            pass

    print("the stand-in starts", flush=True)
    if "STAND_IN_FAILS" in os.environ:
        sys.exit(f"no memory on GPU {arguments.base_gpu_id}")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    time.sleep(float(os.environ.get("STAND_IN_DELAY_S", "0")))
    http.server.ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
