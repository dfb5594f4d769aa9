"""Runs sglang-router: `python -m megatron_fipo.rollout.sglang.router_program SETTINGS.json`.

The router's own program takes its key on the command line, which every user of the machine can see, and imports SGLang.
"""

import json
import resource
import sys
from pathlib import Path

from sglang_router.router import Router
from sglang_router.router_args import RouterArgs

if __name__ == "__main__":
    # Two connections a request.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Router.from_args(RouterArgs(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))).start()
