"""The catalogue of all signals, as a static page: each field of each table and index, and how it hangs together.

`catalogue` collects it from the specifications, the lineage of the code and, where there is a lake, what that holds;
`graph` draws what depends on what; `page` writes both into one folder that needs no server and no network.
"""
