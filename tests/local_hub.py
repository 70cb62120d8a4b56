"""A Hub on loopback with one repository: what huggingface_hub asks for, and no more."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def local_hub(repo, revisions):
    """Serve ``repo``; yields its address.

    Args:
        revisions: name (``main``, a tag) → folder with its files. Its commit is `commit_of(name)`.
    """
    folders = {}
    for name, folder in revisions.items():
        folders[name] = folders[commit_of(name)] = (commit_of(name), Path(folder))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = unquote(urlsplit(self.path).path).strip("/")
            if path == f"api/models/{repo}":
                return self.send(info(*folders["main"]))
            if path.startswith(f"api/models/{repo}/"):
                kind, revision = path.removeprefix(f"api/models/{repo}/").split("/")[:2]
                if revision not in folders:
                    return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
                commit, folder = folders[revision]
                return self.send(info(commit, folder) if kind == "revision" else tree(folder))
            revision, _, name = path.removeprefix(f"{repo}/resolve/").partition("/")
            if not path.startswith(f"{repo}/resolve/") or revision not in folders:
                return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            commit, folder = folders[revision]
            if not (folder / name).is_file():
                return self.send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
            data = (folder / name).read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.send(data, 200, {"X-Repo-Commit": commit, "ETag": etag}, with_body)

        def send(self, data, status=200, headers=None, with_body=True):
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    def files(folder):
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def info(commit, folder):
        siblings = [{"rfilename": name} for name in files(folder)]
        return json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()

    def tree(folder):
        entries = []
        for name in files(folder):
            data = (folder / name).read_bytes()
            oid = hashlib.sha1(data).hexdigest()
            entries.append({"type": "file", "path": name, "size": len(data), "oid": oid})
        return json.dumps(entries).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def commit_of(name):
    """The commit that the hub gives a revision."""
    return hashlib.sha1(name.encode()).hexdigest()
