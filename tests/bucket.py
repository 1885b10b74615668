"""Google's object store in memory, behind the part of its HTTP interface that its clients use here.

gcsfs (and so etils.epath) and tensorstore (and so orbax) are the real ones, and talk to this.
"""

import contextlib
import hashlib
import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c


class Bucket(ThreadingHTTPServer):
    """One bucket of any name; `objects` maps a name to bytes, and each write has a generation.

    `refused`: a write of a name that ends with one of these is answered with 403.  `failing`: what
    becomes of the next requests, in order: "lost" are done, and answered as if they were not; of
    another word it is the answer's code.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.times: dict[str, str] = {}
        self.generation, self.lock = 0, threading.Lock()
        self.refused: set[str] = set()
        self.failing: list[str] = []
        self.written: list[str] = []
        self.parts: dict[str, bytes] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What points the clients here."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service, by gRPC
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def names(self, below: str = "") -> list[str]:
        """List the objects below a place, in order."""
        return sorted(name for name in list(self.objects) if name.startswith(below))


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    with Bucket() as bucket:
        thread = threading.Thread(target=bucket.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            bucket.shutdown()
            thread.join()


class Requests(BaseHTTPRequestHandler):
    """GET, POST and DELETE below /storage/v1/b/BUCKET and /upload/storage/v1/b/BUCKET."""

    server: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client was killed
            super().handle()

    def answer(self, code: int, content: Any = b"", **headers: str) -> None:
        if self.failure:
            code, content, headers = (503 if self.failure == "lost" else int(self.failure)), b"", {}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if body is content else "application/json"
        self.send_response(code)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        told = {"Content-Type": kind, "Content-Length": str(len(body))} | named
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def wanted(self) -> tuple[str, str, str, dict[str, str]]:
        """Return bucket, object, what follows, and the query."""
        with self.server.lock:
            self.failure = self.server.failing.pop(0) if self.server.failing else ""
        url = urlsplit(self.path)
        _, _, rest = url.path.partition("/storage/v1/b/")
        bucket, _, rest = rest.partition("/o")
        name, action, other = rest.removeprefix("/").partition("/rewriteTo/b/")
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        return unquote(bucket), unquote(name), unquote(other if action else ""), query

    def told(self, bucket: str, name: str) -> dict[str, Any]:
        generation, content = self.server.objects[name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": self.server.times[name],
            "updated": self.server.times[name],
            "md5Hash": b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": b64encode(google_crc32c.value(content).to_bytes(4)).decode(),
        }

    def store(
        self, bucket: str, name: str, content: bytes, query: dict[str, str], **told: Any
    ) -> None:
        server = self.server
        with server.lock:
            now = server.objects.get(name, (0, b""))[0]
            if query.get("ifGenerationMatch", str(now)) != str(now):
                return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            if any(name.endswith(end) for end in server.refused):
                return self.answer(403, {"error": {"code": 403, "message": "forbidden"}})
            server.generation += 1
            server.objects[name] = (server.generation, content)
            server.times[name] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
            server.written.append(name)
        return self.answer(200, self.told(bucket, name) | told)

    def do_GET(self) -> None:
        bucket, name, _, query = self.wanted()
        if self.failure not in ("", "lost"):
            return self.answer(200)
        if "/o" not in urlsplit(self.path).path:
            return self.answer(200, {"kind": "storage#bucket", "name": bucket})
        if not name:
            return self.listed(bucket, query)
        if name not in self.server.objects:
            return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
        if query.get("alt") != "media":
            return self.answer(200, self.told(bucket, name))
        generation, content = self.server.objects[name]
        known = {"x-goog-generation": str(generation)}
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304, b"", **known)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.answer(412, b"", **known)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if first and int(first) >= len(content):
                return self.answer(416, b"")
            begin = int(first) if first else len(content) - int(last)
            end = min(int(last) + 1 if first and last else len(content), len(content))
            known["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            return self.answer(206, content[begin:end], **known)
        return self.answer(200, content, **known)

    def listed(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found, folders = [], set()
        for name in self.server.names(prefix):
            if not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            inner, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (0, "", 0)
            if cut:
                folders.add(f"{prefix}{inner}{cut}")
            else:
                found.append(self.told(bucket, name))
        self.answer(200, {"items": found, "prefixes": sorted(folders)})

    def do_POST(self) -> None:
        bucket, name, other, query = self.wanted()
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.failure not in ("", "lost"):
            return self.answer(200)
        if other:
            copy = self.server.objects[name][1]
            return self.store(bucket, other.partition("/o/")[2], copy, {}, done=True)
        if query["uploadType"] == "media":
            return self.store(bucket, query["name"], sent, query)
        if query["uploadType"] == "resumable":
            start = self.path.replace("=resumable", "=part")
            return self.answer(200, Location=f"http://{self.headers['Host']}{start}")
        if query["uploadType"] == "part":
            return self.part(bucket, query, sent)
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        _, facts, rest = sent.split(b"--" + boundary, 2)
        facts = facts.partition(b"\n\n")[2]
        content = rest.rpartition(b"\n--" + boundary + b"--")[0].partition(b"\n\n")[2]
        return self.store(bucket, json.loads(facts)["name"], content, query)

    def part(self, bucket: str, query: dict[str, str], sent: bytes) -> None:
        parts = self.server.parts
        whole = parts[self.path] = parts.get(self.path, b"") + sent
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(whole) - 1}")
        return self.store(bucket, query["name"], parts.pop(self.path), query)

    def do_DELETE(self) -> None:
        _, name, _, query = self.wanted()
        if self.failure not in ("", "lost"):
            return self.answer(200)
        with self.server.lock:
            now = self.server.objects.get(name, (0, b""))[0]
            code = 204 if now else 404
            if now and query.get("ifGenerationMatch", str(now)) != str(now):
                code = 412
            if code == 204:
                del self.server.objects[name]
        return self.answer(code)
