"""The database of a study: it is opened, its errors become one line, and its writes are fenced.

The fence is a row of an own table, one a study::

    widthsearch_driver
    study_id    Optuna's key of the study
    token       grows by one with each driver that takes the study over
    renewed     changes each time that the driver renews its lock
    holder      the driver as JSON; null while there is none

A driver takes the study over by a compare-and-set of the row (:meth:`Fence.take`), which sets the
next token. From then on each of its transactions begins, before its first write, with::

    UPDATE widthsearch_driver SET token = token WHERE study_id = :study AND token = :own

No row matches once another driver has taken over: then an error rolls the transaction back. If the
row matches, the database keeps it locked until the transaction ends (SQLite the whole database), so
no other driver can take over between the check and the write. A driver that was frozen, at whatever
moment, thus changes nothing after it was replaced.

Example: driver A has token 7 and is frozen. B reads the row, sees no renewal for A's time-out, and
sets token 8. A wakes up in the middle of a trial's report: its ``UPDATE ... AND token = 7`` matches
no row, so it raises.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from sqlalchemy import BigInteger, Column, ColumnElement, Connection, Integer, Text

from widthsearch.errors import StorageError, StudyError, WidthsearchError, one_line

LOCK_SECONDS = 30
"""The longest wait for a transaction of another process, and the longest pause within one."""

_OPENERS = 10
"""How often the tables are made again when other processes make them at the same time."""

_DRIVERS = sqlalchemy.Table(
    "widthsearch_driver",
    sqlalchemy.MetaData(),
    Column("study_id", Integer, primary_key=True, autoincrement=False),
    Column("token", BigInteger, nullable=False),
    Column("renewed", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
)

_UNFENCED = {"widthsearch_unfenced": True}
"""The execution options of statements on the fence's own row."""


class _Addressed(Protocol):
    url: str


Method = TypeVar("Method", bound=Callable[..., Any])


def database_errors(method: Method) -> Method:
    """Turn the database's exceptions into errors of one line; for methods of a class with a URL."""

    @functools.wraps(method)
    def wrapped(self: _Addressed, *args: Any, **kwargs: Any) -> Any:
        try:
            with reaching(self.url):
                return method(self, *args, **kwargs)
        except optuna.exceptions.UpdateFinishedTrialError:
            # Optuna reads before it writes: another driver has ended the trial meanwhile.
            fence = cast("Any", self).fence
            if fence.token is not None:
                fence.check()
            raise

    return cast("Method", wrapped)


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """A context that uses a database.

    Raises:
        StorageError: It cannot be reached, read or written.
    """
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise _storage_error(url, error) from error


@contextmanager
def written_here(name: str) -> Iterator[None]:
    """A context that reads stored values: whatever does not fit was written by something else.

    Args:
        name: The study's name, for the message.

    Raises:
        StorageError: A value is missing or has another form.
    """
    try:
        yield
    except WidthsearchError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise StorageError(
            f"the values of a study must be as widthsearch stored them, but study {name!r} has "
            f"others ({one_line(error)}): restore its storage, or give the study another name"
        ) from error


def without_password(url: str) -> str:
    """A database's address as messages show it.

    Example:
        >>> without_password("postgresql://me:secret@host/studies")
        'postgresql://me:***@host/studies'
    """
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return re.sub(r"//[^/]*@", "//***@", url)


def _storage_error(url: str, error: Exception) -> StorageError:
    cause: BaseException = error
    while (deeper := getattr(cause, "orig", None) or cause.__cause__) is not None:
        cause = deeper
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    shown = without_password(url)
    if isinstance(cause, ModuleNotFoundError):
        return StorageError(
            f"the storage {shown!r} needs its database's driver, but {reason}: install it with pip "
            "(for PostgreSQL 'psycopg[binary]', with an address that begins with "
            "postgresql+psycopg://)"
        )
    return StorageError(
        f"the storage {shown!r} cannot be used: {reason}; check its address, its permissions "
        "and the space left on its disk"
    )


_SETTINGS = {
    # Readers never block the driver, and commits do not wait for the disk: with WAL and
    # synchronous=NORMAL the database stays whole through any kill of the process, and only a power
    # cut may undo the last commits.
    "sqlite": (
        f"PRAGMA busy_timeout={LOCK_SECONDS * 1000}",
        "PRAGMA synchronous=NORMAL",
    ),
    # A driver that is frozen within a transaction, or whose host is gone, would keep its locks.
    "postgresql": (
        f"SET lock_timeout = '{LOCK_SECONDS}s'",
        f"SET idle_in_transaction_session_timeout = '{LOCK_SECONDS}s'",
    ),
}
"""The settings of each connection, by kind of database."""


def open_database(url: str, *, make_tables: bool) -> RDBStorage:
    """Open a database.

    Args:
        url: Its address, as any Optuna URL.
        make_tables: Whether to make the tables where they are missing.

    Raises:
        StorageError: It cannot be opened.
    """
    # Optuna reports every new study on stderr, in the middle of the user's table, and each error
    # once more.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for left in reversed(range(_OPENERS)):
        try:
            return _connect(url, make_tables)
        except (
            sqlalchemy.exc.SQLAlchemyError,
            optuna.exceptions.OptunaError,
            ImportError,  # the database's driver is not installed
            RuntimeError,  # tables of another version of Optuna
            ValueError,  # a text where the address has a number, such as its port
        ) as error:
            if not left or not _is_race(error):
                raise _storage_error(url, error) from error
        time.sleep(random.uniform(0.05, 0.2))
    raise AssertionError


def lacks_tables(url: str) -> bool:
    """Whether a database can be reached, and has not all tables: no driver has made them yet."""
    with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError):
        engine = sqlalchemy.create_engine(url)
        try:
            found = sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()
        return not models.BaseModel.metadata.tables.keys() <= {*found}
    return False


def _connect(url: str, make_tables: bool) -> RDBStorage:
    storage = RDBStorage(url, skip_table_creation=not make_tables)
    kind = storage.engine.dialect.name
    settings = _SETTINGS.get(kind, ())
    if kind == "sqlite" and make_tables:  # it changes the file, which a reader must not
        settings = (*settings, "PRAGMA journal_mode=WAL")

    def configure(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        for setting in settings:
            cursor.execute(setting)
        cursor.close()
        connection.commit()

    sqlalchemy.event.listen(storage.engine, "connect", configure)
    storage.engine.dispose()  # the connection that made Optuna's tables has no settings yet
    with storage.engine.connect():
        pass
    if make_tables:
        _DRIVERS.create(storage.engine, checkfirst=True)
    return storage


def _is_race(error: Exception) -> bool:
    """Whether another process was making the same tables."""
    if isinstance(error, sqlalchemy.exc.IntegrityError):
        return True
    text = f"{error} {error.__cause__}"
    return "already exists" in text or "database is locked" in text


@dataclass(frozen=True)
class FenceRow:
    """The row of a study's fence.

    Attributes:
        token: The token of its last driver; 0 if it never had one.
        renewed: Changes with each renewal.
        holder: The driver; None while there is none.

    Example:
        >>> FenceRow(token=2, renewed=7).holder is None
        True
    """

    token: int = 0
    renewed: int = 0
    holder: Mapping[str, Any] | None = None


class Fence:
    """The fence of one study, on one storage object.

    Args:
        url: The database's address, for messages.
        engine: The engine of the storage, whose writes are fenced.
        study: Optuna's key of the study.
        name: Its name, for messages.

    Attributes:
        token: The token that every write of this storage object needs; None before a driver's lock
            was taken through it.

    Example:
        >>> fence = Fence("sqlite://", sqlalchemy.create_engine("sqlite://"), 1, "mine")
        >>> fence.token is None  # reads and writes are not fenced yet
        True
    """

    def __init__(self, url: str, engine: sqlalchemy.Engine, study: int, name: str) -> None:
        self.url = url
        self.token: int | None = None
        self._engine = engine
        self._study = study
        self._name = name
        sqlalchemy.event.listen(engine, "before_cursor_execute", self._before_statement)

    @database_errors
    def read(self) -> FenceRow:
        """The row as it is now."""
        with self._engine.connect() as connection:
            return self._row(connection)

    @database_errors
    def take(self, seen: FenceRow, renewed: int, holder: Mapping[str, Any]) -> bool:
        """Become the driver, if the row is still the one that was seen.

        Args:
            seen: The row on which the decision was made.
            renewed: The first renewal.
            holder: The driver, as JSON values.

        Returns:
            Whether it was; else another driver was faster, or the last one is alive.
        """
        own = {"token": seen.token + 1, "renewed": renewed, "holder": json.dumps(holder)}
        if seen == FenceRow():
            try:
                with self._engine.begin() as connection:
                    insert = _DRIVERS.insert().values(study_id=self._study, **own)
                    connection.execute(insert, execution_options=_UNFENCED)
            except sqlalchemy.exc.IntegrityError:
                return False
        elif not self._update(seen.token, _DRIVERS.c.renewed == seen.renewed, **own):
            return False
        self.token = seen.token + 1
        return True

    @database_errors
    def renew(self, renewed: int) -> bool:
        """Write a renewal; returns False once another driver has taken over."""
        assert self.token is not None
        return self._update(self.token, renewed=renewed)

    @database_errors
    def release(self) -> None:
        """Leave the study without a driver; raise StudyError if another one has taken over."""
        assert self.token is not None
        if not self._update(self.token, holder="null"):
            raise self._lost(self.read())

    @database_errors
    def check(self) -> None:
        """Raise StudyError if another driver has taken over."""
        with self._engine.connect() as connection:
            row = self._row(connection)
        if row.token != self.token:
            raise self._lost(row)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context for writes beside the database: within it no other driver can take over.

        Raises:
            StudyError: Another driver has taken over before.
            StorageError: The database cannot be used.
        """
        try:
            with self._engine.begin() as connection:
                self._require(connection)
                yield
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise _storage_error(self.url, error) from error

    def _before_statement(
        self, connection: Connection, cursor: object, statement: str, *rest: Any
    ) -> None:
        """Check the token before the first write of each transaction, and within it."""
        context = rest[1]
        if self.token is None or _UNFENCED.items() <= context.execution_options.items():
            return
        transaction = connection.get_transaction()
        writes = context.isinsert or context.isupdate or context.isdelete
        if writes and connection.info.get("fenced") is not transaction:
            self._require(connection)
            connection.info["fenced"] = transaction

    def _require(self, connection: Connection) -> None:
        own = (_DRIVERS.c.study_id == self._study) & (_DRIVERS.c.token == self.token)
        locking = _DRIVERS.update().where(own).values(token=_DRIVERS.c.token)
        if not connection.execute(locking, execution_options=_UNFENCED).rowcount:
            raise self._lost(self._row(connection))

    def _update(self, token: int, /, *conditions: ColumnElement[bool], **values: Any) -> bool:
        row = (_DRIVERS.c.study_id == self._study) & (_DRIVERS.c.token == token)
        with self._engine.begin() as connection:
            update = _DRIVERS.update().where(row, *conditions).values(**values)
            return bool(connection.execute(update, execution_options=_UNFENCED).rowcount)

    def _row(self, connection: Connection) -> FenceRow:
        query = _DRIVERS.select().where(_DRIVERS.c.study_id == self._study)
        found = connection.execute(query).one_or_none()
        if found is None:
            return FenceRow()
        return FenceRow(found.token, found.renewed, json.loads(found.holder))

    def _lost(self, row: FenceRow) -> StudyError:
        other = row.holder
        by = f"process {other['pid']} on {other['host']}" if other else "another one"
        return StudyError(
            f"a study has one driver at a time, but {by} took over {self._name!r} while this one "
            "was not running: this one stops, and has changed nothing since"
        )
