//! EVAL, EVALSHA and SCRIPT: where scripts run, and what the proxy remembers of their texts.
//!
//! Invariants: an EVALSHA goes to a node behind a SCRIPT LOAD of its text, on the same connection,
//! unless the connection has seen that SCRIPT LOAD already or nobody here knows the text. So a node
//! that lost its scripts, or never had them, costs no error and changes no order. What SCRIPT FLUSH
//! of this process took is forgotten here too. Another proxy's SCRIPT FLUSH is not heard of: a text
//! that is remembered here may then be loaded once more, which does no harm to data.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slotmesh_command::{Command, Gather};
use slotmesh_resp::{Args, Parsed, RequestParser, write};

use super::Core;
use super::dispatch::Flow;
use super::lane::Lane;
use super::queue::{Entry, Kind};
use super::spec::{self, Request};

/// Texts that a process keeps. A program has some hundred scripts of some KiB.
const TEXTS_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A longer text is not kept, so that one cannot push out all others.
const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Scripts that a connection is known to have loaded; over it, they are loaded again.
const KNOWN_MAX: usize = 4096;
/// Texts that a worker recognizes without computing their digest.
const SEEN_MAX: usize = 4096;

pub(super) type Sha = [u8; 20];

/// Texts of scripts, shared by the workers of a process; oldest out first.
#[derive(Debug, Default)]
pub struct ScriptCache {
    kept: Mutex<Kept>,
    /// How often all was forgotten.
    flushes: AtomicU64,
}

#[derive(Debug, Default)]
struct Kept {
    texts: HashMap<Sha, Arc<[u8]>>,
    order: VecDeque<Sha>,
    bytes: usize,
}

impl ScriptCache {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Acquire)
    }

    pub(super) fn text(&self, sha: &Sha) -> Option<Arc<[u8]>> {
        self.kept().texts.get(sha).cloned()
    }

    fn put(&self, text: &[u8]) {
        if text.len() > TEXT_BYTES_MAX {
            return;
        }
        let sha = sha1_smol::Sha1::from(text).digest().bytes();
        let mut kept = self.kept();
        if kept.texts.contains_key(&sha) {
            return;
        }
        kept.bytes += text.len();
        kept.texts.insert(sha, text.into());
        kept.order.push_back(sha);
        while kept.bytes > TEXTS_BYTES_MAX {
            let Some(oldest) = kept.order.pop_front() else {
                break;
            };
            let text = kept.texts.remove(&oldest);
            kept.bytes -= text.map_or(0, |text| text.len());
        }
    }

    fn flush(&self) {
        *self.kept() = Kept::default();
        self.flushes.fetch_add(1, Ordering::Release);
    }
}

/// What a worker has given to the cache lately.
#[derive(Debug, Default)]
pub(super) struct Seen {
    hasher: RandomState,
    texts: HashSet<u64>,
    flushes: u64,
}

impl Seen {
    /// True if the text was not seen since the last flush.
    fn is_new(&mut self, text: &[u8], flushes: u64) -> bool {
        if self.flushes != flushes || self.texts.len() >= SEEN_MAX {
            self.texts.clear();
            self.flushes = flushes;
        }
        self.texts.insert(self.hasher.hash_one(text))
    }
}

/// The scripts that the node of a connection has, as far as the connection knows.
#[derive(Debug, Default)]
pub struct KnownScripts {
    shas: HashSet<Sha>,
    flushes: u64,
}

impl KnownScripts {
    /// The node may have lost them.
    pub fn forget(&mut self) {
        self.shas.clear();
    }
}

/// Forty hexadecimal digits, in any case.
pub(super) fn parse_sha(digits: &[u8]) -> Option<Sha> {
    let mut sha = [0; 20];
    if digits.len() != 40 {
        return None;
    }
    for (byte, pair) in sha.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = (digit(0)? * 16 + digit(1)?) as u8;
    }
    Some(sha)
}

fn is_evalsha(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"evalsha") || name.eq_ignore_ascii_case(b"evalsha_ro")
}

/// The scripts that the commands of a frame call by their digest.
fn called_in(frame: &[u8]) -> Vec<Sha> {
    let (mut parser, mut args, mut at) = (RequestParser::new(), Args::new(), 0);
    let mut called = Vec::new();
    while let Ok(Parsed::Complete { consumed }) = parser.parse(&frame[at..], &mut args) {
        let arg = |index| args.get(&frame[at..], index).unwrap_or_default();
        if is_evalsha(arg(0)) {
            called.extend(parse_sha(arg(1)));
        }
        at += consumed;
    }
    called
}

/// The digest in `*3\r\n$7\r\nEVALSHA\r\n$40\r\n…`.
fn called_by(frame: &[u8]) -> Option<Sha> {
    let mut lines = frame.splitn(6, |b| *b == b'\n');
    let sha = lines.nth(4)?;
    parse_sha(sha.strip_suffix(b"\r")?)
}

impl Lane {
    /// Loads the scripts that a request calls and this connection has not loaded yet.
    pub(super) fn load_scripts(&mut self, kind: Kind, frame: &[u8]) {
        if kind == Kind::Script {
            if let Some(sha) = called_by(frame) {
                self.load_script(sha);
            }
        } else if memchr::memmem::find(frame, b"\r\n$40\r\n").is_some() {
            called_in(frame)
                .into_iter()
                .for_each(|sha| self.load_script(sha));
        }
    }

    fn load_script(&mut self, sha: Sha) {
        let flushes = self.scripts.flushes();
        if self.known_scripts.flushes != flushes || self.known_scripts.shas.len() >= KNOWN_MAX {
            self.known_scripts.forget();
            self.known_scripts.flushes = flushes;
        }
        if self.known_scripts.shas.contains(&sha) {
            return;
        }
        let Some(text) = self.scripts.text(&sha) else {
            return; // the node may have it, or says that it has not
        };
        self.known_scripts.shas.insert(sha);
        self.flight.push_with(Entry::own(Kind::Load), |bytes| {
            write::encode_command(bytes, &[b"SCRIPT", b"LOAD", &text]);
        });
    }
}

impl Core {
    /// Makes this worker use the texts of its process.
    pub fn share_scripts(&mut self, scripts: Arc<ScriptCache>) {
        self.scripts = scripts;
    }

    /// EVAL, FCALL and their kin.
    pub(super) fn script(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let by_sha = is_evalsha(command.name.as_bytes());
        let confined = self.confines(slot);
        if !confined && let Some(text) = self.script_refusal(command, request) {
            return self.refuse(slot, text.as_bytes());
        }
        let shard = match self.shard_of_keys(command, request) {
            Ok(shard) => shard,
            Err(text) => return self.refuse(slot, text.as_bytes()),
        };
        let kind = if by_sha { Kind::Script } else { Kind::Single };
        if !by_sha && !confined && command.name.starts_with("eval") {
            self.remember_script(request.arg(1));
        }
        self.watch_scripts();
        let effect = spec::effect(command);
        self.forward(slot, shard, kind, effect, 0, request.frame)
    }

    /// SCRIPT LOAD and SCRIPT FLUSH.
    pub(super) fn script_to_all(
        &mut self,
        slot: u32,
        command: &'static Command,
        gather: Gather,
        request: Request<'_>,
    ) -> Flow {
        if let Some(text) = self.script_refusal(command, request) {
            return self.refuse(slot, text.as_bytes());
        }
        match command.name {
            "script|load" => self.remember_script(request.arg(2)),
            _ if request.len() == 2 || request.is(2, "sync") || request.is(2, "async") => {
                self.scripts.flush();
            }
            _ => {}
        }
        self.send_to_all(slot, command, gather, request)
    }

    pub(super) fn remember_script(&mut self, text: &[u8]) {
        if self.seen_scripts.is_new(text, self.scripts.flushes()) {
            self.scripts.put(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_found_in_one_command_and_in_a_block() {
        let sha = "E0E1f9fabfc9d4800c877a703b823ac0578ff8db";
        let parsed = parse_sha(sha.as_bytes()).unwrap();
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &[b"EvalSha", sha.as_bytes(), b"0"]);
        assert_eq!(called_by(&frame), Some(parsed));
        write::encode_command(&mut frame, &[b"SET", sha.as_bytes(), b"0"]);
        assert_eq!(called_in(&frame), [parsed]);
        assert_eq!(parse_sha(b"e0"), None);
        assert_eq!(parse_sha(&[b'x'; 40]), None);
    }

    #[test]
    fn the_cache_is_bounded_and_forgets_the_oldest() {
        let cache = ScriptCache::default();
        let text = |n: u8| vec![n; TEXT_BYTES_MAX];
        let sha = |n: u8| sha1_smol::Sha1::from(text(n)).digest().bytes();
        (0..17).for_each(|n| cache.put(&text(n)));
        assert_eq!(cache.text(&sha(0)), None);
        assert!(cache.text(&sha(1)).is_some() && cache.text(&sha(16)).is_some());
        assert_eq!(cache.kept().bytes, TEXTS_BYTES_MAX);
        cache.put(&[text(0), text(0)].concat());
        assert_eq!(cache.kept().texts.len(), 16);
        cache.flush();
        assert_eq!((cache.text(&sha(1)), cache.flushes()), (None, 1));
    }
}
