"""TRL's small data set, made by TRL's own script, in the place of the hub's."""

import runpy


def replace_load_dataset() -> None:
    """Before TRL's tests are collected: let ``load_dataset`` find this data set alone."""
    import datasets

    made: dict[tuple[str, str], datasets.DatasetDict] = {}

    def keep(self, name: str, config_name: str) -> None:
        made[name, config_name] = self

    def load_dataset(name: str, config_name: str = "", split: str | None = None):
        found = made[name, config_name]
        return found if split is None else found[split]

    datasets.DatasetDict.push_to_hub = keep
    make = runpy.run_path("scripts/generate_zen_dataset.py")["main"]
    make(test_size=0.1, push_to_hub=True, repo_id="trl-internal-testing/zen")
    datasets.load_dataset = load_dataset
