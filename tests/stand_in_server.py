"""`stand_in_server.py PORT [delay_s]`: in the place of an SGLang server, two processes that say when they are ready.

The second one does not end with the first, as SGLang's do not while they are young.
"""

import http.server
import subprocess
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print("the stand-in starts", flush=True)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
