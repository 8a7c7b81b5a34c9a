"""New uploads: protects what is new below a prefix with a fitted protection, unit by unit, each object once.

names         which objects are images or shards
settings      user settings
listing       listing - ledger: what is new, settled and worth an attempt
units         groups of new objects that are protected and committed together
deltas        loads a protection file as a source of deltas for pictures
transaction   one unit -> its objects in the output and its commit
ledger        what was done with every object: unit commits, and the sorted segments they are compacted into
segments      rows of the ledger <-> Parquet
lease         ensures that only one run works on an output at a time
origin        which input, protection and settings an output belongs to
summary       what a run did
verify        checks an output against its ledger
"""
