"What only real processes and real disks can show: kills, full and read-only disks, readers and writers side by side."
import contextlib, errno, math, multiprocessing, os, random, resource, shutil, subprocess, time, warnings
from unittest import mock
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from spectral_diffusion.checkpoints import *

fork = multiprocessing.get_context('forkserver')
fork.set_forkserver_preload(['spectral_diffusion.checkpoints'])

def state_of(step, n=200_000):
    "About 1 MB that depends on the step in every value: one tensor is cut, the others share shards"
    g = torch.Generator().manual_seed(step)
    return dict(model=dict(big=torch.randn(n, generator=g),
                           small=[torch.randn(500, generator=g) for _ in range(40)]),
                opt={0: dict(step=torch.tensor(float(step)))}, rng=g.get_state(), step=step)

def same(a, b):
    if type(a) != type(b): return False
    if torch.is_tensor(a):
        return (a.dtype == b.dtype and a.shape == b.shape
                and torch.equal(a.contiguous().reshape(-1).view(torch.uint8),
                                b.contiguous().reshape(-1).view(torch.uint8)))
    if isinstance(a, dict): return [*map(repr, a)] == [*map(repr, b)] and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else repr(a) == repr(b)

def debris(store):
    "Files that no index names"
    stems = [p.stem for p in store.folder.glob('*.json')]
    return [p.name for p in store.folder.iterdir() if not any(p.stem == s or p.name.startswith(f'{s}-') for s in stems)]

def go_on(folder, conn, shard=2**16):
    "Save one state after another, from where the folder ends, and tell of each that was saved"
    store = Store(folder, keep=2, shard=shard)
    step = max(store.steps(), default=0)
    while True:
        try: store.save(step+1, state_of(step+1), dict(lr=.1), score=1/(step+1))
        except OSError as e:
            if e.errno != errno.EBUSY: raise
            continue
        step += 1
        conn.send(step)

@contextlib.contextmanager
def saving(folder, **kw):
    here, there = fork.Pipe()
    p = fork.Process(target=go_on, args=(folder, there), kwargs=kw, daemon=True)
    p.start(); there.close()
    try: yield p, here
    finally: p.kill(); p.join()

def told(conn):
    "The last step that the process said it had saved"
    step = 0
    with contextlib.suppress(EOFError, ConnectionResetError):
        while conn.poll(): step = conn.recv()
    return step

def killed(folder, kills, seed):
    "Kill as many processes as asked at random times of their saves; how often there was debris to clear"
    rng, torn = random.Random(seed), 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')                              # nothing that has an index may be skipped
        for _ in range(kills):
            with saving(folder) as (p, conn):
                first = conn.recv()
                time.sleep(rng.uniform(0, .25))
                p.kill(); p.join()
                last = max(first, told(conn))
            store = Store(folder, keep=2)
            torn += bool(debris(store))
            o = store.load()
            assert o.step >= last and same(o.state, state_of(o.step)) and o.score == 1/o.step, (o.step, last)
    store.save(10**6, 0)
    assert not debris(store)
    return torn

def test_sigkill(tmp_path):
    "Five processes die while they save; each time a state is there that was saved, the last one that was told of or a later one"
    killed(tmp_path, 5, 0)

@pytest.mark.slow
def test_sigkill_many(tmp_path):
    "The same with forty; most die inside a save, and the next save clears up"
    assert killed(tmp_path, 40, 1) > 10

def test_reader_meanwhile(tmp_path):
    "A reader in another process than the saver sees whole states, in order, and no warning, with everything deleted under its hands"
    seen = []
    with saving(tmp_path, shard=2**18) as (_, conn), warnings.catch_warnings():
        warnings.simplefilter('error')
        conn.recv(); end = time.time() + 2
        while time.time() < end:
            seen.append((o := Store(tmp_path, keep=2).load()).step)
            assert same(o.state, state_of(o.step))
    assert seen == sorted(seen) and len({*seen}) > 3, seen

def in_child(f, *args):
    with fork.Pool(1) as pool: return pool.apply(f, args)

def save_limited(folder, limit):
    "Save with a limit on the size of files; the error number and the message"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try: Store(folder).save(2, state_of(2))
    except OSError as e: return e.errno, str(e)

def test_file_size_limit(tmp_path):
    "A write that the system cuts short (EFBIG) is one clear error; what was there is as it was, and nothing is left over"
    store = Store(tmp_path)
    store.save(1, state_of(1))
    before = sorted(tmp_path.iterdir())
    no, text = in_child(save_limited, tmp_path, 100_000)
    assert no == errno.EFBIG and 'saving step 2' in text and 'File too large' in text
    assert sorted(tmp_path.iterdir()) == before and same(store.load().state, state_of(1))

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 3 MiB"
    disk = tmp_path/'disk'; disk.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk],
                                      capture_output=True).returncode:
        pytest.skip('only root can mount a disk')
    try: yield disk
    finally: subprocess.run(['umount', '-l', disk], check=True)

def test_full_disk(small_disk):
    "Known before: the preflight says what is missing. Not known before: ENOSPC, nothing lost, nothing left over, and when there is room again it works"
    store = Store(small_disk/'ck', keep=1, shard=2**16)
    with pytest.raises(OSError, match='3 checkpoints need'): store.preflight(state_of(1))
    store.save(1, state_of(1))
    with pytest.raises(OSError, match='1 checkpoint needs') as e: store.save(2, state_of(2, 10**6))
    assert e.value.errno == errno.ENOSPC
    with (mock.patch.object(Store, 'preflight'),
          pytest.raises(OSError, match='saving step 2 .* No space left on device') as e):
        store.save(2, state_of(2, 10**6))
    assert e.value.errno == errno.ENOSPC and not debris(store) and same(store.load().state, state_of(1))
    (small_disk/'other').write_bytes(bytes(shutil.disk_usage(small_disk).free - 70_000))
    with mock.patch.object(Store, 'preflight'), pytest.raises(OSError, match='No space left'):
        store.save(2, state_of(2))
    (small_disk/'other').unlink()
    with mock.patch.object(Store, 'preflight'): store.save(2, state_of(2))
    assert store.steps() == [2] and same(store.load().state, state_of(2))

def test_read_only_disk(small_disk):
    "A folder that turns read-only: the save fails in one line, the checkpoint still loads, and a new training is refused at once"
    store = Store(small_disk/'ck')
    store.save(1, dict(a=torch.ones(3)))
    subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
    with mock.patch.object(Store, 'preflight'), pytest.raises(OSError, match='saving step 2 .*Read-only') as e:
        store.save(2, dict(a=torch.ones(3)))
    assert e.value.errno == errno.EROFS and '\n' not in str(e.value)
    assert same(store.load().state, dict(a=torch.ones(3)))
    with pytest.raises(OSError, match='cannot write'): Store(small_disk/'ck')

def test_two_writers(tmp_path):
    "A second process that saves into the same folder is told so, or waits its turn by luck; nothing breaks"
    store, busy = Store(tmp_path, keep=2), 0
    with saving(tmp_path) as (p, conn):
        conn.recv()
        for step in range(1000, 1020):
            try: store.save(step, state_of(step))
            except OSError as e: assert e.errno == errno.EBUSY and 'another process' in str(e), e; busy += 1
            assert same((o := store.load()).state, state_of(o.step))
        assert p.is_alive()
    assert busy > 0

dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
          torch.complex64, torch.complex128]
tensor = st.builds(
    lambda d, shape, seed: torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(seed)).to(d),
    st.sampled_from(dtypes), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 99))
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | tensor
key = (st.text(max_size=3) | st.integers(-3, 3) | st.booleans()
       | st.sampled_from(['$tensor', '$dict', '__metadata__', 'a:0', 'a.b', 'state']))
tree = st.recursive(leaf, lambda s: (st.lists(s, max_size=4) | st.lists(s, max_size=3).map(tuple)
                                     | st.dictionaries(key, s, max_size=4)), max_leaves=12)

@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tree, st.sampled_from([1, 7, 64, 2**20]))
def test_round_trip(tmp_path, state, shard):
    "Any tree of tensors and values, in shards of any size, comes back bit for bit"
    store = Store(tmp_path/'any', keep=1, shard=shard)
    store.save(1, state, score=math.pi)
    assert same(store.load().state, state) and store.load('best').score == math.pi

def test_bits_of_everything(tmp_path):
    "One bit turned over anywhere in any file of the newest checkpoint: its own bits come back, or the one before with a warning that names the file"
    store, rng = Store(tmp_path, shard=700), random.Random(0)
    for step in (1, 2): store.save(step, dict(w=torch.arange(300.)*step, n=step))
    fell = 0
    for _ in range(400):
        p = rng.choice(sorted(tmp_path.glob('000002-*')))
        good = p.read_bytes(); bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8); p.write_bytes(bad)
        with warnings.catch_warnings(record=True) as w: warnings.simplefilter('always'); o = store.load()
        assert (same(o.state, dict(w=torch.arange(300.)*o.step, n=o.step))
                and (o.step == 2 or len(w) == 1 and p.name in str(w[0].message)))
        fell += o.step == 1
        p.write_bytes(good)
    assert fell > 300 and store.load().step == 2

@pytest.mark.slow
def test_beyond_one_write(tmp_path):
    "A tensor larger than what one write() can take"
    big = torch.arange(300_000_000, dtype=torch.int64)
    store = Store(tmp_path, keep=1, shard=2**30)
    store.save(1, [big])
    assert max(p.stat().st_size for p in tmp_path.iterdir()) < 2**30 + 1000
    assert torch.equal(store.load().state[0], big)
