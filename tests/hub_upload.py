"""A stand-in for the hub that accepts uploads: it creates repositories and keeps the committed files."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server.hub, self.path.partition("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            owner, name = request.get("organization"), request["name"]
            repo_id = f"{owner}/{name}" if owner else name
            hub.files.setdefault(repo_id, {})
            return self.answer({"url": f"{hub.url}/{repo_id}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo_id = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[repo_id][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{repo_id}/commit/{'0' * 40}"})
        self.send_error(404)

    def do_GET(self):
        self.answer({"id": "/".join(self.path.split("/")[3:5]), "sha": "0" * 40, "siblings": []})

    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


class UploadHub:
    """files: {repository: {path: content}}; url: its address inside the context."""

    def __init__(self):
        self.files = {}

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.url = self, f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
