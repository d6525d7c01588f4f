//! Whether the node of a one-shard instance would refuse what a client queues in MULTI at the moment:
//! it is full, or busy with a script. One Redis says so when the command is queued.
//!
//! Invariants: this is only about when an error is seen; what is executed is decided by the node at
//! EXEC. However many transactions there are, a worker asks at most 200 times a second while the
//! answer is good. The question changes nothing at the node. A node that does not answer soon is
//! taken for healthy, so that nobody waits here for long.

use slotmesh_command::{Command, Flag};
use slotmesh_resp::{Args, Parsed, Protocol, RequestParser, write};

use super::Core;
use super::client::Transaction;
use super::line::{LineEvent, LineNo, Use};
use super::spec::Request;
use crate::routing::ShardNo;

/// How long a good answer holds: less than CONFIG SET takes, which may change it.
const FINE_US: u64 = 5_000;
/// How long a bad one does: as long as it takes to show it to those who waited for it.
const REFUSED_US: u64 = 2_000;
/// How long to wait for an answer. Longer than a node usually pauses, shorter than clients wait.
const ANSWER_LIMIT_US: u64 = 1_000_000;
/// What a node says that would refuse the commands too.
const REFUSALS: [&[u8]; 3] = [b"-OOM ", b"-BUSY ", b"-MISCONF "];
/// A write of nothing to a key that nobody has: refused by a full node and by a busy one.
const QUESTION: &[&[u8]] = &[b"SETRANGE", b"__slotmesh:health", b"0", b""];

/// Runs commands one after the other: before each its number of words. A full node queues nothing in
/// MULTI, not even what takes no memory, but it executes that much.
const SCRIPT: &[u8] = b"local out, at = {}, 1 while at <= #ARGV do local n = tonumber(ARGV[at]) \
    out[#out + 1] = redis.pcall(unpack(ARGV, at + 1, at + n)) at = at + n + 1 end return out";
/// Lua can unpack a few thousand words.
const WORDS_MAX: usize = 1000;

/// What is known of the node.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Its refusal, as a whole reply.
    refusal: Option<Vec<u8>>,
    known_until_us: u64,
    /// The line of the open question, and when it is given up.
    asking: Option<(LineNo, u64)>,
}

/// What becomes of a command that is queued now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Queued,
    /// With this reply.
    Refused(Vec<u8>),
    /// The node was asked: show the command again.
    Unknown,
}

impl Core {
    /// Whether the node would queue a command, or execute EXEC.
    pub(super) fn admission(&mut self, command: &Command) -> Admission {
        if command.flags.has(Flag::AllowBusy) {
            return Admission::Queued;
        }
        let Some(shard) = self.table.only_shard() else {
            return Admission::Queued;
        };
        if self.health.known_until_us > self.now_us {
            return match &self.health.refusal {
                // A full node queues nothing, but executes what was queued if it takes no memory.
                Some(reply) if reply.starts_with(b"-OOM") && command.name == "exec" => {
                    Admission::Queued
                }
                Some(reply) => Admission::Refused(reply.clone()),
                None => Admission::Queued,
            };
        }
        if self.health.asking.is_none() && !self.ask_health(shard) {
            return Admission::Queued;
        }
        Admission::Unknown
    }

    /// A transaction as a script, if the node is full and no command of it takes memory. Only for
    /// RESP2: a script would change the types of RESP3.
    pub(super) fn as_script(&self, slot: u32, transaction: &Transaction) -> Option<Vec<u8>> {
        let full = self.health.refusal.as_ref()?.starts_with(b"-OOM");
        let protocol = self.sessions.get(slot)?.state.protocol;
        if !full || self.health.known_until_us <= self.now_us || protocol != Protocol::Resp2 {
            return None;
        }
        let (mut words, mut args, mut at) = (Vec::new(), Args::new(), 0);
        let frames = &transaction.frames;
        while let Ok(Parsed::Complete { consumed }) =
            RequestParser::new().parse(&frames[at..], &mut args)
        {
            let frame = &frames[at..at + consumed];
            let request = Request { frame, args: &args };
            let command = slotmesh_command::resolve(&request).ok()?;
            if command.flags.has(Flag::DenyOom) || args.len() > WORDS_MAX {
                return None;
            }
            words.push(args.len().to_string().into_bytes());
            words.extend(args.iter(frame).map(<[u8]>::to_vec));
            at += consumed;
        }
        let mut out = Vec::new();
        write::write_array_header(&mut out, words.len() + 3);
        for word in [&b"EVAL"[..], SCRIPT, b"0"] {
            write::write_bulk(&mut out, word);
        }
        words
            .iter()
            .for_each(|word| write::write_bulk(&mut out, word));
        Some(out)
    }

    fn ask_health(&mut self, shard: ShardNo) -> bool {
        let lane = super::lane::lane_no(shard, Protocol::Resp2);
        let open = self
            .lanes
            .get(lane as usize)
            .is_some_and(|lane| lane.gate.admits());
        if !open {
            return false;
        }
        let Some(no) = self.take_private(shard, Protocol::Resp2, Use::Health) else {
            return false;
        };
        self.write_line(no, |out| write::encode_command(out, QUESTION));
        self.health.asking = Some((no, self.now_us + ANSWER_LIMIT_US));
        self.out.unsteady = true;
        true
    }

    pub(super) fn health_event(&mut self, no: LineNo, event: LineEvent<'_>) {
        match event {
            LineEvent::Ready => {}
            LineEvent::Reply(reply) => {
                let refusal = (reply.first() == Some(&b'-')).then_some(reply);
                self.know_health(refusal);
                self.give_private(no);
            }
            LineEvent::Lost(words) => {
                // A busy node does not even tell a connection's number.
                self.know_health(words);
                self.forget_health_line();
            }
        }
    }

    fn forget_health_line(&mut self) {
        if let Some(shard) = self.table.only_shard() {
            self.privates.forget(shard);
        }
    }

    /// Notes the answer, and shows it to those who wait for it.
    fn know_health(&mut self, refusal: Option<&[u8]>) {
        // Anything else is not about the commands that wait here: a primary that changes, or a question
        // that the node does not know.
        let matters = |reply: &&[u8]| REFUSALS.iter().any(|word| reply.starts_with(word));
        let refusal = refusal.filter(matters);
        self.health.refusal = refusal.map(<[u8]>::to_vec);
        let holds_us = if refusal.is_some() {
            REFUSED_US
        } else {
            FINE_US
        };
        self.health.known_until_us = self.now_us + holds_us;
        self.health.asking = None;
        self.out.freed = true;
        self.out.unsteady = true;
    }

    /// What was known may be wrong now: a parameter of the engine was changed.
    pub(super) fn renew_health(&mut self) {
        self.health.known_until_us = 0;
    }

    /// Gives up a question that is not answered. Returns when to look again.
    pub(super) fn health_on_time(&mut self) -> Option<u64> {
        let (no, until_us) = self.health.asking?;
        if until_us > self.now_us {
            return Some(until_us);
        }
        self.drop_private(no);
        self.know_health(None);
        None
    }
}
