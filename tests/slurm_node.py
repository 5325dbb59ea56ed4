"A real Slurm of one node in a temporary folder: Debian's slurm-wlm and munge, no systemd. `with node()` starts it, sets SLURM_CONF, and stops it by its pids."
import os, platform, shutil, signal, subprocess, tempfile, time
from contextlib import contextmanager
from pathlib import Path

programs = 'slurmctld slurmd munged mungekey sbatch srun squeue'.split()
packages = 'slurm-wlm munge'.split()

conf = '''ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
'''

def missing(install=False):
    "Why Slurm cannot be started here, '' if it can; with `install`, what is missing is installed first"
    if os.geteuid(): return 'starting Slurm needs root'
    os.environ['PATH'] += ':/usr/sbin:/sbin'
    if all(map(shutil.which, programs)): return ''
    if not (install and shutil.which('apt-get')): return f"not installed: {', '.join(packages)}"
    env = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}
    for c in (['apt-get', 'update', '-q'], ['apt-get', 'install', '-qy', '--no-install-recommends', *packages]):
        r = subprocess.run(c, env=env, capture_output=True, text=True, timeout=240)
    return ('' if all(map(shutil.which, programs))
            else f'apt-get could not install {packages}: {r.stderr.strip()[-300:]}')

def wait_for(test, what, timeout=30):
    "Until `test()` is true"
    t0 = time.time()
    while not test():
        if time.time()-t0 > timeout: raise TimeoutError(f'{what}: not within {timeout} s')
        time.sleep(.1)

def _pid(file):
    try: return int(file.read_text())
    except (FileNotFoundError, ValueError): return None

def _alive(pid): return Path(f'/proc/{pid}/stat').exists() and Path(f'/proc/{pid}/stat').read_text().split()[2]!='Z'

def _jobs():
    return subprocess.run(['squeue', '-h', '-o', '%i'], capture_output=True, text=True, timeout=30).stdout.split()

def stop(folder):
    "End the jobs, then the daemons, munge last"
    if _pid(folder/'slurmctld.pid') and _jobs():
        subprocess.run(['scancel', *_jobs()])
        try: wait_for(lambda: not _jobs(), 'the end of all jobs', 20)
        except TimeoutError as e: print(e)
    for n in ('slurmd', 'slurmctld', 'munged'):
        pid = _pid(folder/f'{n}.pid')
        if pid is None or not _alive(pid): continue
        os.kill(pid, signal.SIGTERM)
        try: wait_for(lambda: not _alive(pid), f'the end of {n}', 10)
        except TimeoutError: os.kill(pid, signal.SIGKILL)

def _up(): return 'idle' in subprocess.run(['sinfo', '-h', '-o', '%t'], capture_output=True, text=True).stdout

@contextmanager
def node(cpus=2):
    "A running Slurm; yields its folder (configuration, logs, state)"
    # a socket's path has to be short
    folder, old = Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp')), os.environ.get('SLURM_CONF')
    folder.chmod(0o755)
    port = 20_000 + os.getpid() % 20_000
    (folder/'slurm.conf').write_text(conf.format(folder=folder, host=platform.node().split('.')[0], cpus=cpus,
                                                 port=port, port1=port+1))
    os.environ['SLURM_CONF'] = str(folder/'slurm.conf')
    sh = lambda *c: subprocess.run([*map(str, c)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    gone_well = False
    try:
        for d in ('state', 'spool'): (folder/d).mkdir()
        sh('mungekey', '-c', '-k', folder/'key')
        files = {'socket': 'munge.socket', 'log-file': 'munged.log', 'pid-file': 'munged.pid',
                 'seed-file': 'seed', 'key-file': 'key'}
        sh('munged', *[f'--{o}={folder/f}' for o,f in files.items()])
        sh('slurmctld'); sh('slurmd')
        wait_for(_up, f'an idle node (logs in {folder})')
        yield folder
        gone_well = True
    finally:
        stop(folder)
        if gone_well: shutil.rmtree(folder)                  # else its logs are needed
        os.environ.pop('SLURM_CONF') if old is None else os.environ.update(SLURM_CONF=old)
