//! What a client on its way has at nodes: the connection of its WATCH, and that of a command that waits.
//!
//! Invariant: the node notices nothing. The connection itself travels, with the part of a reply that
//! came and what was not sent, so that a watch stays a watch and nobody loses a place in a queue of
//! waiting clients. What cannot travel whole makes its client stay.

use super::Core;
use super::answer::{SHARD_REMOVED, error_line};
use super::client::{NOBODY, Pause, STATE_BYTES};
use super::hold::SETTLE_LIMIT_US;
use super::line::{LineNo, LooseLine, Use};
use super::tails::Tails;
use super::timeout::Timeout;
use super::waiting::{Part, Purpose, State, Wait};
use super::watching::Watching;

/// WATCH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LooseWatch {
    pub shard_id: String,
    /// `None`: it counts as touched.
    pub line: Option<LooseLine>,
}

/// A command that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LooseWait {
    pub line: LooseLine,
    pub frame: Vec<u8>,
    pub repeatable: bool,
    /// The argument that says how long, whether it counts milliseconds, and how many are left.
    pub timeout: Option<(u32, bool, u64)>,
    /// Its reply goes nowhere.
    pub silent: bool,
    /// Where its reply belongs, as long as it has not left its process.
    pub ticket: Option<(u32, u32)>,
}

/// What a client has at nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    pub watch: Option<LooseWatch>,
    pub wait: Option<LooseWait>,
}

impl Pins {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.watch.is_none() && self.wait.is_none()
    }

    /// Bytes that it takes of a message, as good as.
    #[must_use]
    pub fn bytes_len(&self) -> usize {
        let line = |line: &LooseLine| STATE_BYTES + line.input.len() + line.output.len();
        let watch = self.watch.as_ref().and_then(|watch| watch.line.as_ref());
        let wait = self
            .wait
            .as_ref()
            .map(|wait| line(&wait.line) + wait.frame.len());
        watch.map_or(0, line) + wait.unwrap_or(0)
    }

    /// Connections that belong to it.
    #[must_use]
    pub fn lines(&self) -> usize {
        let watch = self
            .watch
            .as_ref()
            .is_some_and(|watch| watch.line.is_some());
        usize::from(watch) + usize::from(self.wait.is_some())
    }
}

impl Wait {
    /// True if all of it is at one node, and stays there.
    fn is_settled(&self) -> bool {
        let issued = |part: &Part| {
            let at_node = matches!(
                part.state,
                State::Issued {
                    sent: true,
                    until_us: None,
                    ..
                }
            );
            at_node && !part.confirming
        };
        self.purpose == Purpose::Data
            && self.parts.len() == 1
            && self.parts.iter().all(issued)
            && self.unblock.is_none()
            && self.tails.are_known()
    }
}

impl Core {
    /// Whether what a client waits for can travel. `None`: it waits for nothing.
    pub(super) fn wait_travels(&self, slot: u32) -> Option<bool> {
        let number = self.sessions.get(slot)?.extra.as_ref()?.wait?;
        let wait = self.waits.all.get(number as usize)?.as_ref()?;
        Some(wait.is_settled())
    }

    /// Of a command that waits: bytes of its frame, and whether its reply goes nowhere although its
    /// client wants replies.
    pub(super) fn wait_facts(&self, slot: u32) -> (usize, bool) {
        let client = self.sessions.get(slot);
        let number = client.and_then(|client| client.extra.as_ref()?.wait);
        let wait = number.and_then(|number| self.waits.all.get(number as usize)?.as_ref());
        let muted = client.is_some_and(|client| client.is_muted());
        wait.map_or((0, false), |wait| {
            (wait.frame.len(), wait.ticket.0 == NOBODY && !muted)
        })
    }

    /// The connections that a client has at nodes, watch before wait.
    #[must_use]
    pub fn pinned_lines(&self, slot: u32) -> Vec<LineNo> {
        let extra = self.sessions.get(slot).and_then(|c| c.extra.as_deref());
        let Some(extra) = extra else {
            return Vec::new();
        };
        let watch = extra.watching.as_ref().and_then(|watching| watching.line);
        let wait = extra
            .wait
            .and_then(|number| self.waits.all[number as usize].as_ref());
        let wait = wait.and_then(|wait| match wait.parts[0].state {
            State::Issued { line, .. } => Some(line),
            _ => None,
        });
        [watch, wait].into_iter().flatten().collect()
    }

    /// Takes what a client has at nodes away from it. The sockets stay with the worker.
    pub fn loosen_pins(&mut self, slot: u32) -> Pins {
        let mut pins = Pins::default();
        let Some(extra) = self.sessions.get_mut(slot).and_then(|c| c.extra.as_mut()) else {
            return pins;
        };
        let (watching, wait) = (extra.watching.take(), extra.wait.take());
        if let Some(watching) = watching {
            let route = self.table.shards.get(usize::from(watching.shard));
            let route = route.and_then(Option::as_ref);
            let shard_id = route.map(|r| r.shard_id.clone()).unwrap_or_default();
            let line = watching.line.and_then(|no| self.loosen_line(no));
            if line.is_some() {
                self.privates.forget(watching.shard);
            }
            pins.watch = Some(LooseWatch { shard_id, line });
        }
        let wait = wait.and_then(|number| {
            let wait = self.waits.all[number as usize].take();
            self.waits.free.push(number);
            self.waits.due.retain(|other| *other != number);
            wait
        });
        if let Some(wait) = wait
            && let State::Issued { line, .. } = wait.parts[0].state
            && let Some(line) = self.loosen_line(line)
        {
            self.privates.forget(wait.parts[0].shard);
            pins.wait = Some(LooseWait {
                line,
                frame: wait.tails.rewrite(&wait.frame).unwrap_or(wait.frame),
                repeatable: wait.repeatable,
                timeout: wait.timeout.map(|timeout| timeout.parts(self.now_us)),
                silent: wait.ticket.0 == NOBODY,
                ticket: Some(wait.ticket),
            });
        }
        if let Some(client) = self.sessions.get_mut(slot) {
            client.tidy_extra();
        }
        pins
    }

    /// Gives a client what it had at nodes. Returns the numbers of its lines, in their order; `None`
    /// for one that is of no use here and must be closed.
    pub fn fasten_pins(&mut self, slot: u32, pins: Pins) -> Vec<Option<LineNo>> {
        let mut lines = Vec::new();
        if let Some(watch) = pins.watch {
            let had_line = watch.line.is_some();
            let line = self.fasten_watch(slot, watch);
            lines.extend(had_line.then_some(line));
        }
        if let Some(wait) = pins.wait {
            lines.push(self.fasten_wait(slot, wait));
        }
        lines
    }

    fn fasten_watch(&mut self, slot: u32, watch: LooseWatch) -> Option<LineNo> {
        let generation = self.sessions.get(slot)?.generation;
        let shard = self.table.number_of(&watch.shard_id).unwrap_or_default();
        let epoch = self
            .table
            .shards
            .get(usize::from(shard))
            .and_then(Option::as_ref);
        let epoch = epoch.map(|route| route.epoch);
        // At another epoch what was watched counts as touched.
        let current = watch.line.filter(|line| Some(line.epoch) == epoch);
        let user = Use::Watch {
            client: slot,
            generation,
        };
        let line = current.and_then(|line| self.fasten_line(line, user));
        if line.is_some() {
            self.privates.note(shard);
        }
        let client = self.sessions.get_mut(slot)?;
        client.extra_mut().watching = Some(Watching { shard, line });
        line
    }

    fn fasten_wait(&mut self, slot: u32, loose: LooseWait) -> Option<LineNo> {
        let now_us = self.now_us;
        let client = self.sessions.get_mut(slot)?;
        let generation = client.generation;
        let (protocol, db) = (client.state.protocol, client.state.db);
        let ticket = loose.ticket.unwrap_or_else(|| match loose.silent {
            true => (NOBODY, 0),
            false => client.ticket(),
        });
        if client.pause == Pause::None {
            client.pause = Pause::Blocked;
        }
        let number = self.waits.free.pop().unwrap_or_else(|| {
            self.waits.all.push(None);
            (self.waits.all.len() - 1) as u32
        });
        client.extra_mut().wait = Some(number);
        let user = Use::Wait { number, part: 0 };
        let epoch = loose.line.epoch;
        let line = self.fasten_line(loose.line, user);
        let shard = line
            .and_then(|no| self.lines.get(no))
            .map(|line| line.shard);
        let route = shard.and_then(|no| self.table.shards[usize::from(no)].as_ref());
        let is_old = route.is_some_and(|route| route.epoch != epoch);
        let state = match line {
            Some(line) => State::Issued {
                line,
                sent: true,
                // As if the new table had come after it.
                until_us: is_old.then_some(now_us + SETTLE_LIMIT_US),
            },
            None => State::Answered,
        };
        self.waits.all[number as usize] = Some(Wait {
            client: slot,
            generation,
            ticket,
            protocol,
            db,
            purpose: Purpose::Data,
            frame: loose.frame,
            timeout: loose.timeout.map(|parts| Timeout::of_parts(parts, now_us)),
            tails: Tails::default(),
            began_us: now_us,
            repeatable: loose.repeatable,
            unblock: None,
            unblock_asked: false,
            parts: std::iter::once(Part {
                shard: shard.unwrap_or_default(),
                epoch,
                state,
                tries: 0,
                reply: Vec::new(),
                confirming: false,
            })
            .collect(),
            listed: false,
        });
        match shard {
            Some(shard) => self.privates.note(shard),
            None => self.end_wait(number, &error_line(SHARD_REMOVED)),
        }
        if is_old {
            self.waits.list(number);
            self.out.unsteady = true;
        }
        line
    }
}
