"One thread per worker, set before torch is imported: two workers on two cores, and the same numbers everywhere."
import os, sys
from pathlib import Path
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('IN_TEST', '1')
# this environment's commands, activated or not
os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
