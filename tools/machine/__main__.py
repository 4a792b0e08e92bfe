import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))  # the judges

from .run import main

if __name__ == "__main__":
    main()
