"""An evaluation's report page, tables and certificate."""
