-- The newest time of any transaction: the clock goes on after it, whatever the wall clock says after a restart.
CREATE TABLE clock (
    id   INTEGER PRIMARY KEY CHECK (id = 0),
    time INTEGER NOT NULL
);
