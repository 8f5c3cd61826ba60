"""The answers of the hub. Routed on the raw path: a revision arrives as ``release%2F2.0``."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.support.hub_server.state import MAIN, Blob, Repo, State
from tests.support.hub_server.xet import xet_hash

ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/models/{ID}"
PART_BYTES = 256 * 1024


class Problem(Exception):
    """An answer that is an error, known to the client by its X-Error-Code."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Code": code} if code else {}
        if message:
            headers["X-Error-Message"] = message
        self.response = JSONResponse({"error": message or code, **body}, status, headers)


class Routes:
    """The ASGI app."""

    def __init__(self, state: State, url: str, file_host: str, xet_folder: Path | None) -> None:
        self.state, self.url, self.file_host, self.xet_folder = state, url, file_host, xet_folder
        table: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("DELETE", r"/api/repos/delete", self.delete),
            ("POST", r"/api/validate-yaml", self.validate),
            ("GET", r"/api/models", self.models),
            ("GET", rf"{API}/refs", self.refs),
            ("POST", rf"{API}/tag/(?P<revision>[^/]+)", self.tag),
            ("DELETE", rf"{API}/tag/(?P<tag>[^/]+)", self.untag),
            ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", self.preupload),
            ("POST", rf"{API}/commit/(?P<revision>[^/]+)", self.commit),
            ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<under>.*))?", self.tree),
            ("GET", rf"{API}/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)", self.xet_token),
            ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", self.info),
            ("POST", rf"/{ID}\.git/info/lfs/objects/batch", self.lfs_batch),
            ("POST", r"/_lfs/verify", self.lfs_verify),
            ("POST", r"/_lfs/complete/(?P<oid>\w+)", self.lfs_complete),
            ("PUT", r"/_lfs/(?P<oid>\w+)(/(?P<part>\d+))?", self.lfs_put),
            ("GET", r"/_files/(?P<oid>\w+)", self.file),
            ("GET|HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
        ]
        self.table = [(methods.split("|"), re.compile(pattern), handler) for methods, pattern, handler in table]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        try:
            response = await self.answer(request)
        except Problem as problem:
            response = problem.response
        await response(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        for methods, pattern, handler in self.table:
            found = pattern.fullmatch(path)
            if found and request.method in methods:
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                body = await request.body()
                with self.state.lock:
                    result = handler(request, body, **parts)
                return result if isinstance(result, Response) else JSONResponse(result)
        raise Problem(404, message=f"no route {request.method} {path}")

    # Who asks, and for what

    def user(self, request: Request) -> str | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        user = self.state.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise Problem(401, message="Invalid credentials in Authorization header")
        return user

    def readable(self, request: Request, repo_id: str, *, content: bool = False) -> Repo:
        user = self.user(request)
        repo = self.state.repos.get(repo_id)
        if repo is None or (repo.private and user not in repo.readers):
            raise Problem(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and user not in repo.readers:
            raise Problem(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        repo = self.readable(request, repo_id)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.user(request) not in repo.writers or token in self.state.read_only:
            raise Problem(403, message="you have no rights to write here")
        return repo

    @staticmethod
    def sha(repo: Repo, revision: str) -> str:
        found = repo.resolve(revision)
        if found is None:
            raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # Accounts and repositories

    def whoami(self, request: Request, body: bytes) -> Any:
        user = self.user(request)
        if user is None:
            raise Problem(401, message="Invalid username or password.")
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, request: Request, body: bytes) -> Any:
        user = self.user(request)
        if user is None or request.headers["authorization"].removeprefix("Bearer ") in self.state.read_only:
            raise Problem(401 if user is None else 403, message="you may not create repositories")
        fields = json.loads(body)
        repo_id = f"{fields.get('organization') or user}/{fields['name']}"
        if repo_id in self.state.repos:
            raise Problem(409, message="You already created this model repo", url=f"{self.url}/{repo_id}")
        private = fields.get("visibility") == "private" or fields.get("private") is True
        self.state.create(repo_id, private=private, owner=user)
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}

    def delete(self, request: Request, body: bytes) -> Any:
        fields = json.loads(body)
        repo = self.writable(request, f"{fields.get('organization') or self.user(request)}/{fields['name']}")
        del self.state.repos[repo.id]
        return {}

    def validate(self, request: Request, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def models(self, request: Request, body: bytes) -> Any:
        """Two a page, so that clients have to follow the links."""
        user, query = self.user(request), request.query_params
        wanted = [r for r in self.state.repos.values() if not r.private or user in r.readers]
        if query.get("author"):
            wanted = [r for r in wanted if r.id.split("/")[0] == query["author"]]
        start = int(query.get("cursor", "0"))
        rows = [self._info(repo, repo.heads[MAIN], blobs=False) for repo in wanted[start : start + 2]]
        more = {}
        if start + 2 < len(wanted):
            more["Link"] = f'<{self.url}/api/models?author={query.get("author", "")}&cursor={start + 2}>; rel="next"'
        return JSONResponse(rows, headers=more)

    def refs(self, request: Request, body: bytes, id: str) -> Any:
        repo = self.readable(request, id)

        def rows(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        return {"branches": rows("heads", repo.heads), "tags": rows("tags", repo.tags), "converts": []}

    def tag(self, request: Request, body: bytes, id: str, revision: str) -> Any:
        repo, fields = self.writable(request, id), json.loads(body)
        if fields["tag"] in repo.tags:
            raise Problem(409, message=f"Tag {fields['tag']} already exists")
        repo.tags[fields["tag"]] = self.sha(repo, revision)
        return {}

    def untag(self, request: Request, body: bytes, id: str, tag: str) -> Any:
        repo = self.writable(request, id)
        if tag not in repo.tags:
            raise Problem(404, "RevisionNotFound", f"no tag {tag}")
        del repo.tags[tag]
        return {}

    def info(self, request: Request, body: bytes, id: str, revision: str = MAIN) -> Any:
        repo = self.readable(request, id)
        return self._info(repo, self.sha(repo, revision), blobs=request.query_params.get("blobs") == "true")

    def _info(self, repo: Repo, sha: str, *, blobs: bool) -> dict[str, Any]:
        files = [
            {"rfilename": path, **(self._entry(path, blob) if blobs else {})}
            for path, blob in repo.commits[sha].items()
        ]
        fields = {"id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private, "tags": [], "downloads": 0}
        return {**fields, "gated": "auto" if repo.gated else False, "likes": 0, "siblings": files}

    def tree(self, request: Request, body: bytes, id: str, revision: str, under: str = "") -> Any:
        repo = self.readable(request, id, content=True)
        tree = repo.commits[self.sha(repo, revision)]
        return [self._entry(path, blob) for path, blob in tree.items() if path.startswith(under)]

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.lfs, "size": blob.size, "pointerSize": 134}
        if blob.xet:
            entry["xetHash"] = blob.xet
        return entry

    # Uploads

    def preupload(self, request: Request, body: bytes, id: str, revision: str) -> Any:
        repo = self.writable(request, id)
        tree = repo.commits[self.sha(repo, revision)]
        rows = []
        for file in json.loads(body)["files"]:
            path, old = file["path"], tree.get(file["path"])
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            rows.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": (old.lfs or old.oid) if old else None}
            )
        return {"files": rows}

    def commit(self, request: Request, body: bytes, id: str, revision: str) -> Any:
        repo = self.writable(request, id)
        head = self.sha(repo, revision)
        header: dict[str, Any] = {}
        tree = dict(repo.commits[head])
        for line in body.splitlines():
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if key == "header":
                header = value
            elif key == "file":
                tree[value["path"]] = Blob.inline(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                tree[value["path"]] = self._large(value["oid"], value.get("size"))
            elif key == "deletedFile":
                tree.pop(value["path"], None)
            elif key == "deletedFolder":
                tree = {path: blob for path, blob in tree.items() if not path.startswith(value["path"])}
        if header.get("parentCommit") not in (None, head):
            raise Problem(412, message="A commit has happened since. Please refresh and try again.")
        sha = repo.commit(tree, header["summary"], revision)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{id}/commit/{sha}", "hookOutput": ""}

    def _large(self, oid: str, size: int | None) -> Blob:
        if oid in self.state.objects:
            content = self.state.objects[oid]
            return Blob(content, len(content), lfs=oid)
        known = xet_hash(self.xet_folder, oid) if self.xet_folder else None
        if known is None or size is None:
            raise Problem(400, message=f"LFS object {oid} was not uploaded")
        return Blob(None, size, lfs=oid, xet=known)

    def lfs_batch(self, request: Request, body: bytes, id: str) -> Any:
        self.writable(request, id)
        objects = []
        for row in json.loads(body)["objects"]:
            oid, size = row["oid"], row["size"]
            if oid in self.state.objects:
                objects.append({"oid": oid, "size": size})
                continue
            upload: dict[str, Any] = {"href": f"{self.file_host}/_lfs/{oid}"}
            if self.state.mode == "multipart":
                parts = range(1, -(-size // PART_BYTES) + 1)
                header = {str(n): f"{self.file_host}/_lfs/{oid}/{n}" for n in parts}
                upload = {
                    "href": f"{self.url}/_lfs/complete/{oid}",
                    "header": {"chunk_size": str(PART_BYTES), **header},
                }
            verify = {"href": f"{self.url}/_lfs/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "multipart" if self.state.mode == "multipart" else "basic", "objects": objects}

    def lfs_put(self, request: Request, body: bytes, oid: str, part: str | None = None) -> Any:
        if part is None:
            self.state.objects[oid] = body
        else:
            self.state.parts.setdefault(oid, {})[int(part)] = body
        return Response(headers={"ETag": f'"part-{part}"'})

    def lfs_complete(self, request: Request, body: bytes, oid: str) -> Any:
        parts = self.state.parts.pop(oid)
        self.state.objects[oid] = b"".join(parts[row["partNumber"]] for row in json.loads(body)["parts"])
        return {}

    def lfs_verify(self, request: Request, body: bytes) -> Any:
        row = json.loads(body)
        if len(self.state.objects.get(row["oid"], b"")) != row["size"]:
            raise Problem(422, message="the object is missing or of another size")
        return {}

    def xet_token(self, request: Request, body: bytes, id: str, kind: str, revision: str) -> Any:
        repo = self.writable(request, id) if kind == "write" else self.readable(request, id, content=True)
        if self.state.mode != "xet" or self.xet_folder is None:
            raise Problem(404, message="no Xet here")
        self.sha(repo, revision)
        until = int(time.time()) + 3600
        cas = f"local://{self.xet_folder}"
        headers = {
            "X-Xet-Cas-Url": cas,
            "X-Xet-Access-Token": f"xet-{kind}",
            "X-Xet-Token-Expiration": str(until),
        }
        return JSONResponse({"casUrl": cas, "exp": until, "accessToken": f"xet-{kind}"}, headers=headers)

    # Downloads

    def resolve(self, request: Request, body: bytes, id: str, revision: str, path: str) -> Response:
        repo = self.readable(request, id, content=True)
        sha = self.sha(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            problem = Problem(404, "EntryNotFound", "Entry not found")
            problem.response.headers["X-Repo-Commit"] = sha
            raise problem
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.lfs}"', "X-Linked-Size": str(blob.size)}
            if blob.xet:
                route = f"{self.url}/api/models/{id}/xet-read-token/{sha}"
                headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": route}
            return Response(status_code=302, headers={**headers, "Location": f"{self.file_host}/_files/{blob.lfs}"})
        assert blob.content is not None
        return Response(blob.content, headers=headers, media_type="application/octet-stream")

    def file(self, request: Request, body: bytes, oid: str) -> Response:
        """The file host: another origin, which the token must not reach."""
        content = self.state.objects.get(oid)
        if content is None:
            raise Problem(404, "EntryNotFound", "no such object")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Response(content, headers={"ETag": f'"{oid}"'}, media_type="application/octet-stream")
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        span = {"ETag": f'"{oid}"', "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return Response(content[start:stop], 206, span, media_type="application/octet-stream")
