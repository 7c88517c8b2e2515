"""Who was served how much: virtual token counters, after Sheng et al., "Fairness in Serving LLMs" (2024).

Pure. A client's counter grows with every token that is computed for it. Whoever comes (back) starts a small step below
those who are there: nobody saves up service by staying away, and nobody is starved by a client with many requests.
"""

from __future__ import annotations

_QUANTUM = 4096  # tokens; smaller differences decide nothing, so that equals are served in the order that suits all
_REMEMBERED = 4096  # clients


class FairShares:
    """The counters of all clients that have or lately had requests."""

    def __init__(self, quantum: int = _QUANTUM) -> None:
        self._quantum = quantum
        self._served: dict[str, int] = {}  # the longest unseen first
        self._present: dict[str, int] = {}  # client → its requests
        self._known_least: int | None = None

    def join(self, client: str) -> None:
        """Take note of a client's request."""
        count = self._present.get(client, 0)
        if not count:
            self._served[client] = max(self._served.pop(client, 0), self._least() - self._quantum)
            self._forget()
        self._present[client] = count + 1
        self._known_least = None

    def leave(self, client: str) -> None:
        """Take note that a request has ended."""
        self._present[client] -= 1
        if not self._present[client]:
            del self._present[client]
        self._known_least = None

    def charge(self, client: str, tokens: int) -> None:
        """Count tokens that were computed for a client that is present."""
        self._served[client] += tokens
        self._known_least = None

    def rank(self, client: str) -> int:
        """Return how far a client is ahead: those with the lowest number are next."""
        return (self._served[client] - self._least()) // self._quantum

    def _least(self) -> int:
        if self._known_least is None:
            self._known_least = min((self._served[client] for client in self._present), default=0)
        return self._known_least

    def _forget(self) -> None:
        for client in list(self._served):
            if len(self._served) <= _REMEMBERED:
                return
            if client not in self._present:
                del self._served[client]
