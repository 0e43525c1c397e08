"""Writes a data set of these experiments as files of the published gSASRec code (see RIVAL.md).

Command:   python experiments/sequential/rival_data.py runs/sequential_beauty DIR  (a workdir with prepared data)
Hardware:  any
Time:      seconds
Expected:  DIR/{train,val,test}/{input,output}.txt and DIR/dataset_stats.json

A line is a user's item numbers, oldest first; users come in the order of the prepared data. train: all but the last
two; val: the second last is asked for, test: the last, each with everything before it as input. Users with fewer than
three events have no line in train and val.
"""

import argparse
import json
import sys
from pathlib import Path

from pinfm_jax.data.dataset import PreparedDataset
from pinfm_jax.errors import UserError, exit_code


def write_rival_data(workdir: Path, target: Path) -> None:
  """Writes the files.

  Raises:
    UserError: nothing is prepared there, the item ids are not the numbers 1 to the number of items, or the target
      cannot be written.
  """
  dataset = PreparedDataset.open(workdir / 'data')
  users = [history.item.tolist() for history in dataset.histories()]
  items = {item for user in users for item in user}
  if items != set(range(1, len(items) + 1)):
    raise UserError(f'{workdir} has {len(items)} items with other ids than 1 to {len(items)}; the rival counts so')
  try:
    for part, back in (('train', 2), ('val', 2), ('test', 1)):
      kept = [user for user in users if len(user) > back]
      _lines(target / part / 'input.txt', [' '.join(map(str, user[:-back])) for user in kept])
      if part != 'train':
        _lines(target / part / 'output.txt', [str(user[-back]) for user in kept])
    stats = {'num_users': len(users), 'num_items': len(items), 'num_interactions': sum(map(len, users))}
    (target / 'dataset_stats.json').write_text(json.dumps(stats))
  except OSError as error:
    raise UserError(f'{error.filename} cannot be written ({error.strerror}); give a folder that can be') from None


def _lines(path: Path, lines: list[str]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdir', type=Path, help='a workdir with prepared data')
  parser.add_argument('target', type=Path, help='folder to write')
  options = parser.parse_args()
  sys.exit(exit_code(lambda: write_rival_data(options.workdir, options.target)))
