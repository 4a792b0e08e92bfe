"""``make integrations`` runs these tests, in an environment of each trainer."""

import os

collect_ignore_glob = [] if os.environ.get("FASTLORA_INTEGRATION") else ["test_*.py"]
