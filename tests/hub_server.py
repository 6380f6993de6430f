"""A small Hugging Face hub on 127.0.0.1: as much of its protocol as its own client asks for.

Files are regular ones or, as on the hub, large ones by git-lfs: their resolve URL answers with a
redirection to another URL, and with the SHA-256 of the content in X-Linked-Etag.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
REGULAR = {".json", ".md"}
"""Suffixes of files that are not kept by git-lfs."""


@dataclass
class Repository:
    """Contents by commit, and the commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files, ref="main"):
        text = json.dumps([len(self.commits), sorted(files)])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def files(self, revision):
        commit = self.refs.get(revision, revision)
        return commit, self.commits.get(commit)


class Hub:
    """The server's content, and what it was asked for.

    Attributes:
      url: its endpoint.
      storage: the same server as another host, for what the hub keeps elsewhere.
      repositories: by name.
      requests: (method, path, headers by their names in small letters), in order.
      cuts: numbers of bytes after which a download by git-lfs breaks off, one for each next time.
      served: what a download gives in place of the content that a checksum names.
      broken: status of all answers, if it is not None.
    """

    def __init__(self):
        self.url = self.storage = ""
        self.repositories = {}
        self.uploads = {}
        self.requests = []
        self.cuts = []
        self.served = {}
        self.broken = None

    def add(self, name, files, ref="main"):
        """Commit files (name -> bytes) to a repository; returns the commit."""
        return self.repositories.setdefault(name, Repository()).commit(files, ref)

    def downloads(self):
        """Return how many downloads of contents were begun."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        return sum("/resolve/" in path or "/lfs/" in path for path in paths)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.handle_request()

    def do_GET(self):
        self.handle_request()

    def do_PUT(self):
        self.handle_request()

    def do_POST(self):
        self.handle_request()

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        body = self.body()
        if self.hub.broken:
            return self.answer(self.hub.broken, b"broken")
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            return self.lfs(parts[1], body)
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:], body)
        if parts[0] == "api":
            return self.account(parts[1:], body)
        return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status, content=b"", headers=(), length=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content, status=200):
        text = json.dumps(content).encode()
        self.answer(status, text, {"Content-Type": "application/json"})

    def missing(self, code, status=404):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def resolve(self, name, revision, path):
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound", 401)
        commit, files = self.hub.repositories[name].files(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound"}
            return self.answer(404, b"", headers)
        content = files[path]
        if PurePosixPath(path).suffix in REGULAR:
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, headers | {"ETag": f'"{etag}"'})
        oid = hashlib.sha256(content).hexdigest()
        self.hub.uploads[oid] = content
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return self.answer(302, b"", headers | {"Location": f"{self.hub.storage}/lfs/{oid}"})

    def lfs(self, oid, body):
        if self.command == "PUT":
            self.hub.uploads[oid] = body
            return self.answer(200)
        content = self.hub.served.get(oid, self.hub.uploads[oid])
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        rest = content[start:]
        sent = rest[: self.hub.cuts.pop(0)] if self.hub.cuts else rest
        self.answer(206 if start else 200, sent, headers if start else {}, len(rest))
        if len(sent) < len(rest):
            self.close_connection = True

    def batch(self, wanted):
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": f"{self.hub.storage}/lfs/{entry['oid']}"}},
            }
            for entry in wanted["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def account(self, parts, body):
        if parts == ["validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if not self.may_write():
            return self.json({"error": "Invalid username or password."}, 401)
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self.json(url | {"error": "You already created this model repo"}, 409)
        self.hub.add(name, {".gitattributes": b""})
        return self.json(url)

    def api(self, name, parts, body):
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.missing("RepoNotFound", 401)
        revision = parts[1] if len(parts) > 1 else "main"
        commit, files = repository.files(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        verb = parts[0] if parts else "revision"
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.json({"id": name, "sha": commit, "siblings": siblings})
        if verb == "tree":
            return self.json([self.entry(path, content) for path, content in files.items()])
        if not self.may_write():
            return self.json({"error": "Forbidden"}, 403)
        if verb == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {n: "regular" if PurePosixPath(n).suffix in REGULAR else "lfs" for n in names}
            answer = [
                {"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()
            ]
            return self.json({"files": answer})
        return self.commit(name, files, [json.loads(line) for line in body.splitlines()])

    def entry(self, path, content):
        found = {"type": "file", "path": path, "size": len(content)}
        found["oid"] = hashlib.sha1(content).hexdigest()
        if PurePosixPath(path).suffix not in REGULAR:
            oid = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 100}
        return found

    def commit(self, name, files, operations):
        import base64

        files = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(name, files)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


def end_sessions():
    """Close the client's connections, whatever its version calls this."""
    import huggingface_hub
    from huggingface_hub import utils

    end = getattr(huggingface_hub, "close_session", None) or utils.reset_sessions
    end()


@contextmanager
def serving():
    """Run a hub for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.storage = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
