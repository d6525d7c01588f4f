//! Keeps what a lost primary wrote and its successor never had, before it follows and loses it.
//!
//! The agent asks its own node for the end of its history as a replica would, and writes the commands
//! to a file. Invariant: a file holds whole commands only, begins with the database that they are
//! for, has its final name only when it is on disk, and is called complete only if it ends at the
//! node's last byte and begins at the first that its successors are known not to have.

pub mod serve;
pub mod tail;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Read, Write},
    os::unix::{fs::OpenOptionsExt, net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use slotmesh_resp::{Args, Parsed, RequestParser, write::encode_command};

use self::tail::Tail;

/// A backlog is read at hundreds of megabytes a second; a node that takes longer is in trouble, and
/// its host needs a replica again.
const TIME_MAX: Duration = Duration::from_secs(20);
/// Far more than a backlog holds, unless an operator made it huge; it must not fill the disk.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// Between two reads of a stream that is there already.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
const CHUNK_BYTES: usize = 256 << 10;
/// Of a name in a directory.
const NAME_BYTES_MAX: usize = 255;

/// Precedes the commands for another database; the engine writes it so.
const SELECT: &[u8] = b"*2\r\n$6\r\nSELECT\r\n$";
/// With the number of the database: so much at the end of what was read may be the beginning of one.
const SELECT_BYTES_MAX: usize = SELECT.len() + 32;

/// Not data: how the primary keeps its stream alive and in order.
const UPKEEP: [&[u8]; 5] = [b"PING", b"REPLCONF", b"SELECT", b"MULTI", b"EXEC"];

/// What to read, and to where.
#[derive(Debug, Clone)]
pub struct Plan {
    pub socket: PathBuf,
    pub user: String,
    pub secret: String,
    pub replid: String,
    /// First byte that the node still has.
    pub oldest: u64,
    /// First byte that the successors do not have, or may not have.
    pub tail: Tail,
    /// The node's last byte.
    pub until: u64,
    /// Of what precedes the first known change of the database.
    pub database: u32,
    pub file: PathBuf,
}

/// What was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub commands: u64,
    pub complete: bool,
    /// Of the file; empty: there was nothing to keep, and there is no file.
    pub sha256: String,
    /// Why it is not complete.
    pub why: &'static str,
}

/// Whether this names a file of lost writes, and nothing else.
pub fn is_name(name: &str) -> bool {
    name.ends_with(".resp")
        && !name.starts_with('.')
        && name.len() <= NAME_BYTES_MAX
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Reads and keeps; blocks for as long as `TIME_MAX`.
pub fn capture(plan: &Plan) -> io::Result<Kept> {
    let next = plan.file.with_extension("next");
    let mut keeper = Keeper::open(&next, plan)?;
    let mut why = if !plan.tail.known {
        "no failover that is remembered tells where its successors' history departs: it may hold \
         writes that they have"
    } else if plan.oldest > plan.tail.from {
        "the node's backlog had begun after the successor's last byte"
    } else {
        ""
    };
    let stream = match plan.oldest <= plan.until {
        true => stream_from(plan),
        false => Ok(None),
    };
    match stream {
        Ok(Some(stream)) => {
            if let Some(stopped) = keeper.read(stream)? {
                why = stopped;
            }
        }
        Ok(None) => why = "the node would not continue its history",
        Err(error) => {
            let _ = fs::remove_file(&next);
            return Err(error);
        }
    }
    keeper.close(&next, plan, why)
}

/// The history from the oldest byte on; `None`: the node has a reason not to give it.
fn stream_from(plan: &Plan) -> io::Result<Option<UnixStream>> {
    let mut stream = UnixStream::connect(&plan.socket)?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    stream.set_write_timeout(Some(READ_TIMEOUT))?;
    let login = ask(
        &mut stream,
        &[b"AUTH", plan.user.as_bytes(), plan.secret.as_bytes()],
    )?;
    if !login.starts_with('+') {
        return Err(io::Error::other("the node refused its administrator"));
    }
    let oldest = plan.oldest.to_string();
    let answer = ask(
        &mut stream,
        &[b"PSYNC", plan.replid.as_bytes(), oldest.as_bytes()],
    )?;
    Ok(answer.starts_with("+CONTINUE").then_some(stream))
}

/// Byte by byte: what follows the line is the stream.
fn ask(stream: &mut UnixStream, args: &[&[u8]]) -> io::Result<String> {
    const LINE_BYTES_MAX: usize = 512;
    let mut frame = Vec::new();
    encode_command(&mut frame, args);
    stream.write_all(&frame)?;
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && line.len() < LINE_BYTES_MAX {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// Goes through the history and writes the lost part of it.
#[derive(Debug)]
struct Keeper {
    file: BufWriter<File>,
    digest: Sha256,
    written: u64,
    commands: u64,
    /// Of the byte that comes next.
    offset: u64,
    until: u64,
    from: u64,
    database: u32,
    /// What was read and is not behind us: the end of what may be a SELECT, or of a command.
    pending: Vec<u8>,
    /// The next byte is the first of a command of the lost part.
    in_commands: bool,
    /// Where a command begins is not known before the first SELECT.
    overrun: bool,
}

impl Keeper {
    fn open(next: &Path, plan: &Plan) -> io::Result<Self> {
        let _ = fs::remove_file(next);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(next)?;
        Ok(Self {
            file: BufWriter::with_capacity(CHUNK_BYTES, file),
            digest: Sha256::new(),
            written: 0,
            commands: 0,
            offset: plan.oldest,
            until: plan.until,
            from: plan.tail.from,
            database: plan.database,
            pending: Vec::new(),
            in_commands: false,
            overrun: plan.oldest > plan.tail.from,
        })
    }

    /// To the last byte, or to where it can't go on: then says why.
    fn read(&mut self, mut stream: UnixStream) -> io::Result<Option<&'static str>> {
        let deadline = Instant::now() + TIME_MAX;
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.offset + self.pending.len() as u64 <= self.until {
            if Instant::now() >= deadline {
                return Ok(Some("the node took too long to give it"));
            }
            let left = self.until + 1 - self.offset - self.pending.len() as u64;
            let most = CHUNK_BYTES.min(usize::try_from(left).unwrap_or(CHUNK_BYTES));
            let count = match stream.read(&mut chunk[..most]) {
                Ok(0) | Err(_) => return Ok(Some("the node stopped giving it")),
                Ok(count) => count,
            };
            self.pending.extend_from_slice(&chunk[..count]);
            if !self.in_commands {
                self.skip();
            }
            if self.in_commands
                && let Some(why) = self.keep()?
            {
                return Ok(Some(why));
            }
        }
        Ok((!self.pending.is_empty()).then_some("it ends within a command"))
    }

    /// Passes over what the successor has too, and learns for which database it ended.
    fn skip(&mut self) {
        if self.overrun {
            self.skip_to_select();
            return;
        }
        let before = usize::try_from(self.from - self.offset).unwrap_or(usize::MAX);
        let common = self.pending.len().min(before);
        let mut at = 0;
        while let Some(found) = find_select(&self.pending[at..common]) {
            self.database = found.database;
            at += found.end;
        }
        if common == before {
            self.advance(before);
            self.in_commands = true;
        } else {
            self.advance(at.max(common.saturating_sub(SELECT_BYTES_MAX)));
        }
    }

    /// The first place that is known to be the beginning of a command.
    fn skip_to_select(&mut self) {
        match find_select(&self.pending) {
            Some(found) => {
                self.advance(found.start);
                self.in_commands = true;
            }
            None => self.advance(self.pending.len().saturating_sub(SELECT_BYTES_MAX)),
        }
    }

    fn advance(&mut self, bytes: usize) {
        self.pending.drain(..bytes);
        self.offset += bytes as u64;
    }

    fn keep(&mut self) -> io::Result<Option<&'static str>> {
        let mut args = Args::new();
        let mut at = 0;
        let mut stopped = None;
        while at < self.pending.len() {
            let mut parser = RequestParser::new();
            let consumed = match parser.parse(&self.pending[at..], &mut args) {
                Ok(Parsed::Complete { consumed }) => consumed,
                Ok(Parsed::Incomplete { .. }) => break,
                Ok(Parsed::Empty { consumed }) => {
                    at += consumed;
                    continue;
                }
                Ok(Parsed::Inline { .. }) | Err(_) => {
                    stopped = Some("what the node gave is no command");
                    break;
                }
            };
            let frame = &self.pending[at..at + consumed];
            let is_data = args
                .get(frame, 0)
                .is_some_and(|name| !UPKEEP.iter().any(|u| name.eq_ignore_ascii_case(u)));
            if self.written + consumed as u64 > FILE_BYTES_MAX {
                stopped = Some("it is more than one file may hold");
                break;
            }
            if self.written == 0 && !self.overrun {
                let mut select = Vec::new();
                let database = self.database.to_string();
                encode_command(&mut select, &[b"SELECT", database.as_bytes()]);
                self.digest.update(&select);
                self.file.write_all(&select)?;
                self.written += select.len() as u64;
            }
            self.digest.update(frame);
            self.file.write_all(frame)?;
            self.written += consumed as u64;
            self.commands += u64::from(is_data);
            at += consumed;
        }
        self.advance(at);
        Ok(stopped)
    }

    fn close(self, next: &Path, plan: &Plan, why: &'static str) -> io::Result<Kept> {
        let complete = why.is_empty();
        let mut kept = Kept {
            commands: self.commands,
            complete,
            sha256: String::new(),
            why,
        };
        if complete && self.commands == 0 {
            drop(self.file);
            fs::remove_file(next)?;
            return Ok(kept);
        }
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.sync_all()?;
        fs::rename(next, &plan.file)?;
        if let Some(dir) = plan.file.parent() {
            File::open(dir)?.sync_all()?;
        }
        kept.sha256 = hex::encode(self.digest.finalize());
        Ok(kept)
    }
}

struct Found {
    start: usize,
    end: usize,
    database: u32,
}

/// The first whole SELECT in the bytes.
fn find_select(bytes: &[u8]) -> Option<Found> {
    let mut at = 0;
    loop {
        let start = at + memchr::memmem::find(&bytes[at..], SELECT)?;
        if let Some(found) = select_at(bytes, start) {
            return Some(found);
        }
        at = start + 1;
    }
}

fn select_at(bytes: &[u8], start: usize) -> Option<Found> {
    let rest = bytes.get(start + SELECT.len()..)?;
    let line = rest.windows(2).take(8).position(|w| w == b"\r\n")?;
    let digits: usize = std::str::from_utf8(&rest[..line]).ok()?.parse().ok()?;
    let number = rest.get(line + 2..line + 2 + digits)?;
    let end = line + 2 + digits + 2;
    let database = std::str::from_utf8(number).ok()?.parse().ok()?;
    (rest.get(end - 2..end)? == b"\r\n").then_some(Found {
        start,
        end: start + SELECT.len() + end,
        database,
    })
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
