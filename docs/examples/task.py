"""A task of one's own: the next item from the last item of the history alone.

python sft.py --plugin docs/examples/task.py --tasks next_sid,last_item2sid:0.5 ...
"""

from data import register_task
from minionerec.language.examples import RowDataset


class LastItemDataset(RowDataset):
    """SID of the last item -> next SID."""

    task = "last_item2sid"

    def get_prompt_texts(self, row):
        return row.history_sids[-1:]


register_task(
    "last_item2sid",
    prompt_field="history",
    target_field="sid",
    templates={"prompt": "{history}", "target": "{sid}"},
    build=lambda inputs, encoder: LastItemDataset(inputs.rows, encoder),
)
