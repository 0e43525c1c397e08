"""Puts stored rows into tables that lie over several devices; started by test_imported.py.

python imported_worker.py OUT: OUT holds what import_tables wrote; prints what was found as JSON.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_loop import WithTables  # noqa: E402

from pinfm_jax.config import MeshConfig  # noqa: E402
from pinfm_jax.serve.import_tables import ImportedManifest, mapped_rows  # noqa: E402
from pinfm_jax.serve.warm_start import ImportedRows, StoredStart  # noqa: E402
from pinfm_jax.train.restore import fresh_state  # noqa: E402
from pinfm_jax.train.sharding import make_mesh  # noqa: E402


def main(out: str) -> None:
  """On 4 x 1 x 1, on 1 x 2 x 2, and with replicas: rows over one axis of 2 x 2 x 1."""
  manifest = ImportedManifest.read(Path(out))
  numbers, rows = mapped_rows(Path(out), manifest)
  seen = []
  for layout in (MeshConfig(4, 1, 1), MeshConfig(1, 2, 2), MeshConfig(2, 2, 1, table_axes=('fsdp',))):
    with jax.set_mesh(mesh := make_mesh(layout)):
      create, abstract = fresh_state(WithTables(), mesh, 1, None, layout)
      expected = np.array(create().tables.rows_GE)
      expected[numbers] = rows
      start = StoredStart(Path(out), ImportedRows(Path(out), manifest), {}, {})
      table = start.begin(create, abstract).tables.rows_GE
      same = all(np.array_equal(shard.data, expected[shard.index]) for shard in table.addressable_shards)
      seen.append([same, table.sharding == abstract.tables.rows_GE.sharding, len(table.addressable_shards)])
  print(json.dumps({'devices': jax.device_count(), 'seen': seen}))


if __name__ == '__main__':
  main(sys.argv[1])
