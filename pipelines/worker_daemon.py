"""What Spark starts on this machine to fork its Python workers: its own daemon, without archives on the path.

Belongs here: nothing else. Spark puts its Python part and its core jar on the workers' path, and forgets what Python
knows of that path before every task. CPython before 3.13 then reads each archive's directory again, which took more
than all that an epoch's task has to do. The same packages are installed in the environment.
"""

import sys
from zipfile import is_zipfile
from zipimport import zipimporter

sys.path[:] = [entry for entry in sys.path if not is_zipfile(entry)]
for _entry in [e for e, importer in sys.path_importer_cache.items() if isinstance(importer, zipimporter)]:
    del sys.path_importer_cache[_entry]

from pyspark.daemon import manager  # noqa: E402

if __name__ == "__main__":
    manager()
