"One thread per worker, set before torch is imported: two workers on two cores, and the same numbers everywhere."
import os
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('IN_TEST', '1')
