"""Serve folders as a small Hugging Face hub on this machine: real HTTP without a network.

It has the part of the hub's API that downloads of models and datasets use, and uploads of small
files. A request for a missing repository gets the same answer as from the real hub, with its
X-Error-Code.
"""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_LARGE = (".parquet", ".safetensors")


class Hub:
    """The server, a context manager. A process with `environment(home)` uses it as its hub;
    `served` lists the downloaded files as "repo/path". With a folder `uploads` those that have the
    token may make repositories in it; `private` says which are."""

    token = "hf_of-these-tests"

    def __init__(self, uploads=None):
        self.uploads, self.private, self.large = uploads, {}, {}
        self.repos = {}  # (kind, name) -> {revision or commit: (commit, folder)}
        self.gated = set()
        self.served = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind, name, folder, revision="main"):
        """Serve `folder` as one revision of a repository of `kind` "models" or "datasets". Return
        the commit."""
        commit = hashlib.sha1(f"{kind}/{name}@{revision}".encode()).hexdigest()
        revisions = self.repos.setdefault((kind, name), {})
        revisions[revision] = revisions[commit] = (commit, folder)
        return commit

    def environment(self, home):
        """Return the environment of a process that uses only this hub and has an empty cache."""
        others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return {
            **others,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }


def _entry(folder, path):
    content = (folder / path).read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, body, status=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code, status=404):
        self._send({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def _find(self, kind, name, revision):
        """Return (commit, folder), or None after an answer that says what is missing."""
        if (kind, name) in self.hub.gated:
            return self._refuse("GatedRepo", 403)
        revisions = self.hub.repos.get((kind, name))
        if revisions is None:
            return self._refuse("RepoNotFound")
        return revisions.get(revision) or self._refuse("RevisionNotFound")

    def do_HEAD(self):
        self.do_GET()

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, path = self._body().decode(), urlsplit(self.path).path.strip("/")
        parts = path.split("/")
        if parts[:2] == ["api", "validate-yaml"]:
            self._send({"errors": [], "warnings": []})
        elif parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[0] == "api" and parts[4:5] in (["preupload"], ["commit"]):
            self._upload(f"{parts[1]}/{parts[2]}/{parts[3]}", parts[4], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for thing in objects:
                there = f"{self.hub.url}/lfs/{thing['oid']}"
                thing["actions"] = {"upload": {"href": there}}
            self._send({"transfer": "basic", "objects": objects})
        else:
            is_json = "json" in self.headers.get("Content-Type", "")
            self._answer(json.loads(body) if is_json else parse_qs(body))

    def do_PUT(self):
        content = self._body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._send(b"")

    def _may_write(self):
        may = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if not may:
            self._send({"error": "Invalid username or password."}, 401)
        return may

    def _create(self, asked):
        if not self._may_write():
            return
        name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.private:
            self._send({"error": "You already created this repo", "url": url}, 409)
            return
        self.hub.private[name] = asked.get("private", asked.get("visibility") == "private")
        (self.hub.uploads / name).mkdir(parents=True)
        self._send({"url": url})

    def _upload(self, name, action, body):
        """Say how each file is to be sent, or take a commit: lines of a header and files."""
        if not self._may_write():
            return
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
            return
        for line in body.splitlines():
            value = json.loads(line)["value"]
            if "path" in value:
                path = self.hub.uploads / name / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                large = "oid" in value
                path.write_bytes(
                    self.hub.large[value["oid"]] if large else base64.b64decode(value["content"])
                )
        self._send({"commitOid": "0" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/0"})

    def do_GET(self):
        self._answer({})

    def _answer(self, form):
        # Split before unquoting, so that a quoted slash stays in its part.
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) >= 4:
            kind, name, rest = parts[1], f"{parts[2]}/{parts[3]}", parts[4:]
            action = rest[0] if rest else "revision"
            found = self._find(kind, name, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return
            commit, folder = found
            files = _files(folder)
            if action == "revision":
                siblings = [{"rfilename": f} for f in files]
                self._send({"id": name, "sha": commit, "siblings": siblings, "tags": []})
            elif action == "tree":
                self._tree(folder, files, "/".join(rest[2:]))
            elif action == "paths-info":
                self._send([_entry(folder, p) for p in form.get("paths", []) if p in files])
            else:
                self._refuse("EntryNotFound")
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) < 5 or parts[2] != "resolve":
            self._refuse("EntryNotFound")
            return
        name, path = f"{parts[0]}/{parts[1]}", "/".join(parts[4:])
        found = self._find(kind, name, parts[3])
        if found is None:
            return
        commit, folder = found
        if path not in _files(folder):
            self._send(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        if self.command == "GET":
            self.hub.served.append(f"{name}/{path}")
        content = (folder / path).read_bytes()
        etag = f'"{_entry(folder, path)["oid"]}"'
        span = self.headers.get("Range")
        if span and self.command == "GET":
            start, _, end = span.removeprefix("bytes=").partition("-")
            last = min(int(end) if end else len(content) - 1, len(content) - 1)
            covers = f"bytes {int(start)}-{last}/{len(content)}"
            part = content[int(start) : last + 1]
            self._send(part, 206, ETag=etag, X_Repo_Commit=commit, Content_Range=covers)
        else:
            self._send(content, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def _tree(self, folder, files, under):
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0]
        inside = [f for f in files if not under or f.startswith(under + "/")]
        depth = under.count("/") + 1 if under else 0
        folders = {"/".join(f.split("/")[:n]) for f in inside for n in range(1, f.count("/") + 1)}
        folders = {f for f in folders if f.count("/") >= depth}
        if recursive.lower() != "true":
            inside = [f for f in inside if f.count("/") == depth]
            folders = {f for f in folders if f.count("/") == depth}
        if under and not inside and not folders:
            self._refuse("EntryNotFound")
            return
        listed = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        self._send(listed + [_entry(folder, f) for f in inside])
