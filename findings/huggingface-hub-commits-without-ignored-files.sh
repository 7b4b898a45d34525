#!/usr/bin/env bash
# HfApi.create_commit leaves out files that the Hub's preupload marks as ignored (the repository's .gitignore), and
# returns as if all had been committed: no exception, no warning, no field of the answer says so. A push of an adapter
# to a repository that ignores *.safetensors ends well and holds no weights.
# Source: huggingface_hub/_commit_api.py, where _prepare_commit_payload skips such files with a line of level INFO.
# huggingface_hub 2.4.0, Python 3.11; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet huggingface_hub==2.4.0
HF_HOME="$work" HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1 NO_PROXY=127.0.0.1 "$work/venv/bin/python" -W error - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from huggingface_hub import CommitOperationAdd, HfApi

committed = []


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            fact = {"uploadMode": "regular", "oid": None}
            answer = {"files": [{"path": n, "shouldIgnore": n.endswith(".safetensors"), **fact} for n in names]}
        else:
            committed.extend(json.loads(line)["value"].get("path") for line in body.splitlines()[1:])
            answer = {"commitUrl": f"{endpoint}/me/x/commit/{'a' * 40}", "commitOid": "a" * 40}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Hub)
endpoint = f"http://127.0.0.1:{server.server_address[1]}"
threading.Thread(target=server.serve_forever, daemon=True).start()
names = ["adapter_config.json", "adapter_model.safetensors"]
made = HfApi(endpoint=endpoint, token="hf_x").create_commit(
    "me/x", [CommitOperationAdd(name, b"{}") for name in names], commit_message="an adapter"
)
print(f"asked to commit {names}, committed {committed}, answered {made.oid[:8]} without a word")
assert made.oid == "a" * 40
assert committed == ["adapter_config.json"]
PYTHON
