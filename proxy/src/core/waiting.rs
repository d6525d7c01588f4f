//! A command that waits: what the proxy knows of it while it is somewhere between its client and its
//! nodes. [`super::blocking`] moves it on.
//!
//! Invariant: it is answered once, when all its parts are answered or one of them ends it.

use slotmesh_resp::{Protocol, parse_i64, write};
use smallvec::SmallVec;

use super::answer::error_line;
use super::line::LineNo;
use super::tails::Tails;
use super::timeout::Timeout;
use super::unblock::{RETRY_US, UNBLOCKED, Unblock};
use crate::routing::ShardNo;

/// What kind of answer there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// One node's.
    Data,
    /// WAIT: the smallest number of all shards.
    Replicas,
    /// WAITAOF: two of them.
    Copies,
    /// OK, and the line stays with the client.
    Watch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not at a node.
    Held {
        since_us: u64,
        retry_at_us: u64,
    },
    Issued {
        line: LineNo,
        /// The node has, or may have, the command.
        sent: bool,
        /// When the line is given up.
        until_us: Option<u64>,
    },
    Answered,
}

#[derive(Debug)]
pub(super) struct Part {
    pub(super) shard: ShardNo,
    /// Of the shard, when it was issued.
    pub(super) epoch: u64,
    pub(super) state: State,
    pub(super) tries: u32,
    pub(super) reply: Vec<u8>,
    /// The reply is there; the node was asked whether enough replicas have what was done.
    pub(super) confirming: bool,
}

#[derive(Debug)]
pub(super) struct Wait {
    pub(super) client: u32,
    pub(super) generation: u32,
    /// Generation and number of the reply.
    pub(super) ticket: (u32, u32),
    pub(super) protocol: Protocol,
    pub(super) db: u16,
    pub(super) purpose: Purpose,
    pub(super) frame: Vec<u8>,
    pub(super) timeout: Option<Timeout>,
    pub(super) tails: Tails,
    pub(super) began_us: u64,
    /// Running it twice does no harm.
    pub(super) repeatable: bool,
    /// CLIENT UNBLOCK: with an error, or as if the time were over.
    pub(super) unblock: Option<Unblock>,
    /// Its node was asked to unblock it.
    pub(super) unblock_asked: bool,
    pub(super) parts: SmallVec<[Part; 1]>,
    /// It is in the list of those with a deadline.
    pub(super) listed: bool,
}

/// All waiting commands of a worker.
#[derive(Debug, Default)]
pub(super) struct Waits {
    pub(super) all: Vec<Option<Wait>>,
    pub(super) free: Vec<u32>,
    /// Those about which the proxy has to do something in time.
    pub(super) due: Vec<u32>,
}

impl Waits {
    pub(super) fn get(&mut self, number: u32) -> Option<&mut Wait> {
        self.all.get_mut(number as usize)?.as_mut()
    }

    pub(super) fn list(&mut self, number: u32) {
        if let Some(wait) = self.all[number as usize].as_mut()
            && !std::mem::replace(&mut wait.listed, true)
        {
            self.due.push(number);
        }
    }
}

impl Wait {
    /// The answer when the time is over.
    pub(super) fn nil(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self.purpose {
            Purpose::Data | Purpose::Watch => write::write_null_array(&mut out, self.protocol),
            Purpose::Replicas => write::write_int(&mut out, 0),
            Purpose::Copies => {
                write::write_array_header(&mut out, 2);
                write::write_int(&mut out, 0);
                write::write_int(&mut out, 0);
            }
        }
        out
    }

    pub(super) fn unblocked(&self, how: Unblock) -> Vec<u8> {
        match how {
            Unblock::Timeout => self.nil(),
            Unblock::Error => error_line(UNBLOCKED),
        }
    }

    /// When the proxy has to act.
    pub(super) fn deadline_us(&self, budget_us: u64, now_us: u64) -> Option<u64> {
        let look_again = self.unblock.is_some() && !self.unblock_asked;
        let mut next = look_again.then_some(now_us + RETRY_US);
        let over = self.timeout.map(|timeout| timeout.until_us);
        for part in &self.parts {
            let at = match part.state {
                State::Held {
                    since_us,
                    retry_at_us,
                } => {
                    let overdue = since_us.saturating_add(budget_us);
                    let retry = (retry_at_us > now_us).then_some(retry_at_us);
                    [Some(overdue), retry, over].into_iter().flatten().min()
                }
                State::Issued { until_us, .. } => until_us,
                State::Answered => None,
            };
            next = [next, at].into_iter().flatten().min();
        }
        next
    }

    /// The answer, made of those of all parts.
    pub(super) fn reply(&mut self) -> Vec<u8> {
        let is_error = |part: &Part| part.reply.first() == Some(&b'-');
        if let Some(at) = self.parts.iter().position(is_error) {
            return std::mem::take(&mut self.parts[at].reply);
        }
        if let [part] = &mut self.parts[..] {
            return std::mem::take(&mut part.reply);
        }
        let numbers = |part: &Part| -> Vec<i64> {
            let lines = part.reply.split(|b| *b == b'\n');
            let numbers = lines.filter_map(|line| line.strip_prefix(b":"));
            let read = |digits: &[u8]| parse_i64(digits.trim_ascii_end()).unwrap_or(0);
            numbers.map(read).collect()
        };
        let smallest = self.parts.iter().map(numbers).reduce(|mut all, more| {
            all.iter_mut().zip(more).for_each(|(a, b)| *a = (*a).min(b));
            all
        });
        let (smallest, mut out) = (smallest.unwrap_or_default(), Vec::new());
        if self.purpose == Purpose::Copies {
            write::write_array_header(&mut out, smallest.len());
        }
        for number in smallest {
            write::write_int(&mut out, number);
        }
        out
    }
}
