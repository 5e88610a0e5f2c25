"""A certificate authority and a TLS front for tests: the embedded broker itself has no TLS."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import select
import socket
import ssl
import threading
from pathlib import Path

import pytest


class Authority:
    """A throw-away certificate authority; its certificates are for this name."""

    def __init__(self, folder: Path, name: str = "127.0.0.1") -> None:
        pytest.importorskip("cryptography")
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        folder.mkdir()
        now = datetime.datetime.now(datetime.UTC)
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])

        def certificate(subject: x509.Name, public_key: ec.EllipticCurvePublicKey, is_ca: bool) -> x509.Certificate:
            builder = (
                x509.CertificateBuilder(ca_name, subject, public_key, x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(hours=1))
                .not_valid_after(now + datetime.timedelta(hours=1))
                .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
                .add_extension(x509.KeyUsage(not is_ca, False, False, False, False, is_ca, is_ca, False, False), critical=True)
            )
            if not is_ca:
                try:
                    alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
                except ValueError:
                    alternative = x509.DNSName(name)
                builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            return builder.sign(ca_key, hashes.SHA256())

        pem = serialization.Encoding.PEM
        self.ca, self.certificate, self.key = folder / "ca.crt", folder / "server.crt", folder / "server.key"
        self.ca.write_bytes(certificate(ca_name, ca_key.public_key(), True).public_bytes(pem))
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
        self.certificate.write_bytes(certificate(subject, key.public_key(), False).public_bytes(pem))
        self.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


class TlsFront:
    """Terminates TLS in front of a server that has none, as a managed broker's gateway or stunnel does.

    Threads and plain sockets: when :meth:`close` returns, every socket is closed.
    """

    def __init__(self, target: int, authority: Authority) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(authority.certificate, authority.key)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        with self._lock:
            self._closing = True
            for one in self._open:
                _shut(one)
        _shut(self._listener)  # wakes the thread that accepts
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(near,), daemon=True))
            self._threads[-1].start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(plain.close)
            self._keep(plain, stack)
            near = stack.enter_context(self._context.wrap_socket(plain, server_side=True))  # fails if not trusted
            self._keep(near, stack)
            far = stack.enter_context(socket.create_connection(("127.0.0.1", self._target)))
            self._keep(far, stack)
            while True:
                # select does not report data that OpenSSL has already read from the socket.
                ready = [near] if near.pending() else select.select((near, far), (), ())[0]
                for end in ready:
                    data = end.recv(65536)
                    if not data:
                        return
                    (far if end is near else near).sendall(data)

    def _keep(self, one: socket.socket, stack: contextlib.ExitStack) -> None:
        """Register a socket, so that :meth:`close` closes it."""
        with self._lock:
            if self._closing:
                raise ConnectionAbortedError
            self._open.add(one)
        stack.callback(self._drop, one)

    def _drop(self, one: socket.socket) -> None:
        with self._lock:
            self._open.discard(one)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(one, socket.SHUT_RDWR)  # not the TLS one, which writes to the connection
