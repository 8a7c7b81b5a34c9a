"""Everything that computes, and can be used from a notebook: no Ray, no flags, no printing.

On top stands what every room needs: errors, records, json_record, settings, fingerprint, layout, metrics, profile,
schedules. Below, a room imports only rooms that stand before it in this list; the last three do not know each other.

storage      where objects lie: local folders and buckets, retries, conditional writes
pictures     one picture: formats, decoding and encoding, metadata, which member of a sample it is, views of it
shards       inputs by URL, tar reading and writing, squares cut from samples
surrogates   pretrained encoders, their weights, and the features they give
clusters     from features to clusters: the space, k-means, targets
deltas       what is added to pictures, what makes it, the protection file, and how it is laid
fitting      how deltas and proxies are fitted to a collection
measures     what a protection does to pictures, verification of an output, estimates for a dry run
runs         records of a run: its settings, commits and totals, and whether it may start
report       the page that a run leaves
one_for_all  One for All (14A): training of a universal generator
relearning   what a collection still teaches: targets, regimes, labels, denoisers, the report and the certificate
uploads      new uploads, protected unit by unit, each object once
"""
