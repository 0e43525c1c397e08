"""Saves and restores tables on a mesh of all devices under that mesh; started by test_restore.py.

python restore_worker.py OUT: prints what was found as JSON.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_loop import WithTables  # noqa: E402

from pinfm_jax.config import MeshConfig  # noqa: E402
from pinfm_jax.train.checkpoint import Checkpoints  # noqa: E402
from pinfm_jax.train.restore import WarmStart, fresh_state, warm_started  # noqa: E402
from pinfm_jax.train.sharding import make_mesh  # noqa: E402


def main(out: str) -> None:
  """Saves on 2 x 2 x 1, restores and warm-starts on 4 x 1 x 1 and on 1 x 2 x 2."""
  with jax.set_mesh(mesh := make_mesh(MeshConfig(2, 2, 1))):
    create, _ = fresh_state(WithTables(), mesh, 0, None)
    state = create()
    checkpoints = Checkpoints(Path(out) / 'checkpoints')
    checkpoints.save(state, {'seed': 0})
    checkpoints.close()
  seen = []
  for config in (MeshConfig(4, 1, 1), MeshConfig(1, 2, 2)):
    with jax.set_mesh(mesh := make_mesh(config)):
      create, abstract = fresh_state(WithTables(), mesh, 1, None)
      checkpoints = Checkpoints(Path(out) / 'checkpoints', read_only=True)
      restored = checkpoints.restore(abstract, {'seed': 0})
      checkpoints.close()
      for found in (restored, warm_started(create, abstract, WarmStart(Path(out)))):
        arrays, kept, asked = (jax.tree.leaves(tables) for tables in (found.tables, state.tables, abstract.tables))
        same = [np.array_equal(a, b) for a, b in zip(arrays, kept, strict=True)]
        where = [a.sharding == b.sharding for a, b in zip(arrays, asked, strict=True)]
        seen.append([*map(bool, same), *where])
  print(json.dumps({'devices': jax.device_count(), 'seen': seen}))


if __name__ == '__main__':
  main(sys.argv[1])
