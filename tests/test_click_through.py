"""Click-through tables: the public formats, the division, the vocabularies."""

import gzip

import numpy as np
import polars as pl
import pytest

from pinfm_jax.data.click_through import MISSING, UNKNOWN, SplitOptions, encode_column, load_click_table, make_table
from pinfm_jax.data.public.click_through import load_avazu, load_criteo, load_movielens_clicks
from pinfm_jax.data.public.schema import ClickRows
from pinfm_jax.errors import UserError

AVAZU = (
  'id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,'
  'device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21'
)


def write_criteo(folder, rows=200, seed=0):
  """Lines in the published format, with empty fields; returns the folder, labels, integers (None), categories."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 2, rows)
  numbers = [[None if rng.random() < 0.2 else int(v) for v in rng.integers(-2, 500, 13)] for _ in range(rows)]
  values = [['' if rng.random() < 0.1 else f'{int(v):08x}' for v in rng.integers(0, 6, 26) ** 3] for _ in range(rows)]
  lines = [
    '\t'.join([str(label), *('' if v is None else str(v) for v in dense), *sparse])
    for label, dense, sparse in zip(labels, numbers, values, strict=True)
  ]
  (folder / 'train.txt').write_text('\n'.join(lines) + '\n')
  return folder, labels, numbers, values


def write_avazu(folder, rows=48):
  """Hour h of 21 and 22 October 2014 (a Tuesday and a Wednesday) has one row."""
  lines = [AVAZU]
  for i in range(rows):
    hour = f'1410{21 + i // 24}{i % 24:02d}'
    fields = ['1005', '0', 'site', 'a', 'b', 'app', 'c', 'd', 'x', f'ip{i}', 'm', '1', '0', *'23456789']
    lines.append(','.join([f'{10**19 + i}', str(i % 3 == 0).replace('True', '1').replace('False', '0'), hour, *fields]))
  (folder / 'train.csv').write_text('\n'.join(lines) + '\n')
  return folder


def write_movielens(folder, ratings='ratings.dat'):
  (folder / 'users.dat').write_text('1::F::1::10::48067\n2::M::56::16::70072\n')
  (folder / 'movies.dat').write_text(
    "1::Toy Story (1995)::Animation|Children's\n2::Mission: Impossible (1996)::Action\n3::Am\xe9lie::Comedy\n",
    encoding='latin-1',
  )
  stars = [(1, 1, 5, 40), (1, 2, 3, 10), (1, 3, 1, 30), (2, 1, 2, 20), (2, 3, 4, 50)]
  if ratings == 'ratings.dat':
    (folder / ratings).write_text('\n'.join('::'.join(map(str, row)) for row in stars) + '\n')
  else:
    columns = {'orig_user': 0, 'movie_id': 1, 'rating': 2}
    pl.DataFrame({name: [row[i] for row in stars] for name, i in columns.items()}).write_parquet(folder / ratings)
  return folder


def rows_of(**columns):
  sparse = tuple(name for name in columns if name not in ('label', 'time'))
  return ClickRows('made', 'none', pl.LazyFrame(columns), sparse=sparse, time='time' if 'time' in columns else '')


def test_criteo_is_read_as_written(tmp_path):
  folder, labels, numbers, values = write_criteo(tmp_path)
  table = load_click_table('criteo', folder, min_count='3', seed=4)
  assert len(table) == 200
  np.testing.assert_array_equal(table.label_N, labels)
  np.testing.assert_array_equal(table.dense_NF, np.array(numbers, float))  # None is NaN
  assert table.sparse_NF.shape == (200, 26)
  assert table.sparse_NF.dtype == np.int32
  train = set(table.rows_of('train'))
  for s, (name, vocabulary) in enumerate(table.vocabularies.items()):
    column = [row[s] for row in values]
    counts = {v: sum(column[i] == v for i in train) for v in set(column) - {''}}
    assert sorted(vocabulary) == sorted(v for v, count in counts.items() if count >= 3), name
    assert [counts[v] for v in vocabulary] == sorted((counts[v] for v in vocabulary), reverse=True)
    codes = {v: i for i, v in enumerate(vocabulary, 2)}
    expected = [MISSING if v == '' else codes.get(v, UNKNOWN) for v in column]
    np.testing.assert_array_equal(table.sparse_NF[:, s], expected)
    assert table.sparse_sizes[s] == len(vocabulary) + 2
  assert any(np.any(table.sparse_NF == code) for code in (MISSING, UNKNOWN))


def test_criteo_in_gzip_and_just_its_first_rows(tmp_path):
  folder, labels, _, _ = write_criteo(tmp_path)
  whole = load_click_table('criteo', folder)
  (folder / 'train.txt.gz').write_bytes(gzip.compress((folder / 'train.txt').read_bytes()))
  packed = load_click_table('criteo', folder / 'train.txt.gz')
  np.testing.assert_array_equal(packed.sparse_NF, whole.sparse_NF)
  part = load_click_table('criteo', folder, rows=50)
  np.testing.assert_array_equal(part.label_N, labels[:50])
  assert 'Just the first 50 rows were read.' in part.notes
  assert not any('rows were read' in note for note in whole.notes)


def test_criteo_is_divided_by_the_order_of_its_rows(tmp_path):
  table = load_click_table('criteo', write_criteo(tmp_path)[0], split='time', shares='0.5,0.3,0.2')
  assert list(table.part_N) == [0] * 100 + [1] * 60 + [2] * 40


def test_a_file_of_another_form_is_refused(tmp_path):
  path = tmp_path / 'train.txt'
  path.write_text('\t'.join(['1'] * 39) + '\n')  # the file without labels
  with pytest.raises(UserError, match='39 columns, expected 40: label, 13 integers, 26 categories'):
    load_criteo(path)
  good = ['0', *['1'] * 13, *['aa'] * 26]
  path.write_text('\t'.join(good) + '\n' + '\t'.join(['7', *good[1:]]) + '\n')
  with pytest.raises(UserError, match=r'a label is 7.0, expected 0 or 1'):
    load_click_table('criteo', path)
  path.write_text('\t'.join(good) + '\n' + '\t'.join(good[:-30]) + '\n' + '\t'.join(['', *good[1:]]) + '\n')
  with pytest.raises(UserError, match='a label is None'):
    load_click_table('criteo', path)
  path.write_text('\t'.join(good) + '\n' + '\t'.join(['0', 'many', *good[2:]]) + '\n')
  with pytest.raises(UserError, match='not the files of criteo as published') as caught:
    load_click_table('criteo', path)
  assert '\n' not in str(caught.value)
  with pytest.raises(UserError, match='no files of Avazu here; expected train.csv or train.gz or train'):
    load_avazu(tmp_path)
  (tmp_path / 'train.csv').write_text(AVAZU.replace('device_ip', 'ip') + '\n')
  with pytest.raises(UserError, match="no column 'device_ip'"):
    load_avazu(tmp_path)


def test_avazu_has_the_hour_of_the_day_and_the_weekday_but_no_id(tmp_path):
  rows = load_avazu(write_avazu(tmp_path))
  frame = rows.rows.collect()
  assert 'id' not in frame.columns
  assert 'hour' not in rows.sparse
  assert len(rows.sparse) == 23
  assert frame['label'].to_list()[:4] == [1, 0, 0, 1]
  assert frame['hour_of_day'].to_list() == [f'{i % 24:02d}' for i in range(48)]
  assert frame['weekday'].to_list() == ['2'] * 24 + ['3'] * 24
  table = load_click_table('avazu', tmp_path, split='time')
  assert np.all(np.diff(table.part_N.astype(int)) >= 0)
  assert table.dense_NF.shape == (48, 0)
  ip = list(table.vocabularies).index('device_ip')
  assert np.all(table.sparse_NF[table.rows_of('train'), ip] >= 2)
  assert np.all(table.sparse_NF[table.rows_of('test'), ip] == UNKNOWN)  # training has not seen them


@pytest.mark.parametrize('ratings', ['ratings.dat', 'ml1m_sasrec_edition.parquet'])
def test_movielens_as_clicks(tmp_path, ratings):
  rows = load_movielens_clicks(write_movielens(tmp_path, ratings))
  assert rows.rows.collect().select('label', *rows.sparse).rows() == [
    (1, '1', '1', 'F', '1', '10', '48067', "Animation|Children's"),
    (0, '1', '3', 'F', '1', '10', '48067', 'Comedy'),
    (0, '2', '1', 'M', '56', '16', '70072', "Animation|Children's"),
    (1, '2', '3', 'M', '56', '16', '70072', 'Comedy'),
  ]
  options = SplitOptions('time', shares=(0.5, 0.25, 0.25))
  if ratings == 'ratings.dat':
    assert list(make_table(rows, options).part_N) == [1, 0, 0, 2]  # times 40, 30, 20, 50
  else:
    with pytest.raises(UserError, match="has no times; use split='random'"):
      make_table(rows, options)


def test_the_real_movielens_has_the_rows_of_the_protocol(pinfm_data):
  table = load_click_table('movielens', pinfm_data / 'ml1m')
  assert len(table) == 738_577
  assert [np.sum(table.part_N == i) for i in range(3)] == [590_862, 73_857, 73_858]
  stars = pl.read_parquet(pinfm_data / 'ml1m' / 'ml1m_sasrec_edition.parquet')['rating']
  assert np.sum(table.label_N) == int((stars > 3).sum())
  assert dict(zip(table.vocabularies, table.sparse_sizes, strict=True)).items() >= {
    'gender': 4, 'age': 9, 'occupation': 23, 'user_id': 6042,
  }.items()  # fmt: skip
  assert not np.any(table.sparse_NF == MISSING)


def test_the_random_division_is_exact_and_of_its_seed():
  rows = rows_of(label=[0.0, 1.0] * 500, a=[str(i) for i in range(1000)])
  first, again, other = (make_table(rows, SplitOptions(seed=seed)) for seed in (0, 0, 1))
  assert [len(first.rows_of(part)) for part in ('train', 'validation', 'test')] == [800, 100, 100]
  np.testing.assert_array_equal(first.part_N, again.part_N)
  assert np.any(first.part_N != other.part_N)
  # What just the validation or test part has is no value of the vocabulary.
  np.testing.assert_array_equal(first.sparse_NF[:, 0] == UNKNOWN, first.part_N > 0)


def test_rows_of_one_moment_are_of_one_part():
  time = [5, 1, 5, 2, 5, 1, 3, 5, 2, 1]  # sorted: 1 1 1 2 2 3 5 5 5 5; the border after 60 % is 5
  rows = rows_of(label=[0.0] * 10, a=['x'] * 10, time=time)
  table = make_table(rows, SplitOptions('time', shares=(0.4, 0.2, 0.4)))
  assert list(table.part_N) == [{1: 0, 2: 1, 3: 1, 5: 2}[t] for t in time]
  with pytest.raises(UserError, match='made: 10 rows, none of them for validation'):
    make_table(rows, SplitOptions('time', shares=(0.7, 0.1, 0.2)))


def test_equally_frequent_values_stand_in_their_order():
  train = np.array([True] * 6 + [False] * 2)
  codes, values = encode_column(pl.Series(['b', 'a', None, 'c', 'c', '', 'd', 'a']), train, 1)
  assert values.to_list() == ['c', 'a', 'b']
  assert codes.tolist() == [4, 3, MISSING, 2, 2, MISSING, UNKNOWN, 3]
  codes, values = encode_column(pl.Series(['b', 'a', None]), np.ones(3, bool), 2)
  assert values.to_list() == []
  assert codes.tolist() == [UNKNOWN, UNKNOWN, MISSING]


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'split': 'user'}, "split is 'user'; expected 'random' or 'time'"),
    ({'shares': '0.8,0.2'}, r'shares are \(0.8, 0.2\); expected three'),
    ({'shares': '0.8,0.3,0.1'}, 'sum to 1'),
    ({'shares': '1,0,0'}, 'expected three positive ones'),
    ({'min_count': 0}, 'min_count is 0; expected at least 1'),
    ({'seed': -1}, 'seed is -1'),
    ({'rows': -1}, 'rows is -1; expected a number of rows, or 0 for all'),
    ({'rows': 'few'}, "'rows' got 'few'; expected a value of type int"),
    ({'rows': 2}, '2 rows, none of them for'),
    ({'core': 5}, "criteo has no option 'core'; it has: rows, split, shares, seed, min_count"),
  ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, words):
  folder = write_criteo(tmp_path, rows=20)[0]
  with pytest.raises(UserError, match=words):
    load_click_table('criteo', folder, **options)


def test_an_unknown_set_and_no_rows_are_refused(tmp_path):
  with pytest.raises(UserError, match="no click-through set 'kdd'; known: criteo, avazu, movielens"):
    load_click_table('kdd', tmp_path)
  with pytest.raises(UserError, match='made: there are no rows'):
    make_table(rows_of(label=pl.Series([], dtype=pl.Float32), a=pl.Series([], dtype=pl.String)), SplitOptions())
  (tmp_path / 'ratings.dat').write_text('1::1::5::1\n')
  with pytest.raises(UserError, match='expected users.dat'):
    load_movielens_clicks(tmp_path)
  (tmp_path / 'users.dat').write_text('1::F::1\n')
  (tmp_path / 'movies.dat').write_text('1::A::B\n')
  with pytest.raises(UserError, match='line 1: 3 fields, expected user_id::gender::age::occupation::zip'):
    load_movielens_clicks(tmp_path)
