"""Job records in Redis: every transition is one atomic Lua script on the server's clock (:mod:`latentline.scripts`)."""

from .costs import step_costs
from .dead import dead_letter, dead_letters, drop_dead_letter, request_of_letter
from .driving import Call, Operation, arun, domain_errors, run
from .events import START, events, follow, follow_many, gone, positions, read_streams, ring
from .fleet import CachedFleet, Fleet, durability, fleet, models, served, workers
from .held import MAX_ERRORS, Backoff, Beat, Signal, Verdict
from .jobs import cancel, delete, get, get_many, get_with_key, not_found, submit
from .keys import create_key, find_keys, keys, revoke_key
from .lists import MAX_LABELS, MAX_LOOK, MAX_PAGE, JobFilter, list_jobs
from .maintenance import MAX_OVERDUE, MAX_WAKE
from .outbox import callbacks, due_callbacks, replay_callback
from .overview import Overview, overview
from .secrets import create_secret, revoke_secrets, rotate_secret, secret_times
from .tagged import Created, Look, newest, newest_at_ms, tagged
from .timeline import AttemptStory, timeline
from .unanswered import ENDED_S, WRITTEN_S, AnswerOutcome, note_answer, take_unanswered
from .worker import Records

__all__ = [
    "ENDED_S", "MAX_ERRORS", "MAX_LABELS", "MAX_LOOK", "MAX_OVERDUE", "MAX_PAGE", "MAX_WAKE", "START", "WRITTEN_S",
    "AnswerOutcome", "AttemptStory", "Backoff", "Beat", "CachedFleet", "Call", "Created", "Fleet", "JobFilter", "Look", "Operation",
    "Overview", "Records", "Signal", "Verdict", "arun", "callbacks", "cancel", "create_key", "create_secret", "dead_letter",
    "dead_letters", "delete", "domain_errors", "drop_dead_letter", "due_callbacks", "durability", "events", "find_keys", "fleet", "follow",
    "follow_many", "get", "get_many", "get_with_key", "gone", "keys", "list_jobs", "models", "newest", "newest_at_ms",
    "not_found", "note_answer", "overview", "positions", "read_streams", "replay_callback", "request_of_letter", "revoke_key",
    "revoke_secrets", "ring", "rotate_secret", "run", "secret_times", "served", "step_costs", "submit", "tagged",
    "take_unanswered", "timeline", "workers",
]  # fmt: skip
