"""How the tenants of a worker share its device. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

REMEMBERED = 256  # Time constant of the exponential decay, in steps.
MOST_OF_SHARE = 1.5  # of an equal share of the usage: a tenant that has had more is behind the others


class Usage(Protocol):
    """What a request costs its tenant in a step."""

    @property
    def tenant(self) -> str: ...
    @property
    def rows(self) -> int: ...


class TenantShares:
    """The rows that each tenant has had lately, and which tenants are therefore served after the others.

    Usage counts only under contention: rows that no other tenant wanted are not charged.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}  # tenant -> rows, decaying from step to step

    def __len__(self) -> int:
        """Tenants whose usage is remembered."""
        return len(self._used)

    def behind(self, wanted: Mapping[str, int]) -> set[str]:
        """The tenants to serve after the others.

        The order is: tenants within their share that want no more rows than the mean; those that want more than the mean;
        those that have had more than ``MOST_OF_SHARE`` of an equal share of the usage. All but the first group present
        are behind, so with one tenant, or with equal ones, none is.

        Args:
            wanted: rows that each tenant has in flight; not empty.
        """
        mean_wanted = sum(wanted.values()) / len(wanted)
        mean_used = sum(self._used.get(tenant, 0.0) for tenant in wanted) / len(wanted)

        def group(tenant: str) -> int:
            if self._used.get(tenant, 0.0) > MOST_OF_SHARE * mean_used:
                return 2
            return 1 if wanted[tenant] > mean_wanted else 0

        groups = {tenant: group(tenant) for tenant in wanted}
        first = min(groups.values())
        return {tenant for tenant in wanted if groups[tenant] > first}

    def charge(self, requests: Iterable[Usage]) -> None:
        """The requests took part in a step that several tenants wanted. Usage below one row is forgotten."""
        self._used = {tenant: kept for tenant, used in self._used.items() if (kept := used * (1 - 1 / REMEMBERED)) > 1}
        for request in requests:
            self._used[request.tenant] = self._used.get(request.tenant, 0.0) + request.rows
