//! Shards that are busy with a script of this worker's clients.
//!
//! A script that runs for long holds up everything behind it on the shared connection, and the node
//! answers others `BUSY`. So while a script is on a lane that is silent, a connection of its own asks
//! the node; as long as it says `BUSY`, clients hear that too instead of waiting.
//!
//! Invariants: only a node's own word makes a lane busy, and its next reply ends it. A busy node is
//! alive: the lane is not given up for its silence.

use slotmesh_command::Command;
use slotmesh_resp::{Protocol, write};

use super::Core;
use super::dispatch::Flow;
use super::lane::{Lane, LaneNo, Link};
use super::line::{LineEvent, LineNo, Opening, Use};
use super::queue::{Entry, Kind};
use super::retry::Effect;
use crate::routing::Login;

/// A script that takes longer than this is looked at, and again each time. Far less than engines'
/// own limit (5 s), because that is a parameter, and far more than most scripts take.
const LOOK_US: u64 = 20_000;

/// Commands that engines take while they are busy.
const ALLOWED: &[&str] = &[
    "auth",
    "hello",
    "reset",
    "quit",
    "multi",
    "discard",
    "watch",
    "unwatch",
    "script|kill",
    "function|kill",
    "function|stats",
];

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Busy {
    /// When to look at the lanes again; `None`: no script is on its way.
    look_at_us: Option<u64>,
    /// A script was sent since the last look.
    sent: bool,
    /// Lanes that are being asked about.
    asked: Vec<(LaneNo, LineNo)>,
    /// Lanes whose node is busy, and its words.
    lanes: Vec<(LaneNo, Vec<u8>)>,
}

/// True if a script is in flight. Not only at the front: a node keeps the replies to what came with
/// it, too, until it has ended.
fn may_run_script(lane: &Lane) -> bool {
    let is_script = |entry: &Entry| {
        matches!(entry.effect, Effect::Script | Effect::ReadScript)
            || matches!(entry.kind, Kind::Block | Kind::JobBlock)
    };
    lane.link == Link::Up && lane.flight.entries().any(is_script)
}

impl Core {
    /// A script was sent to some lane.
    pub(super) fn watch_scripts(&mut self) {
        self.busy.sent = true;
        if self.busy.look_at_us.is_none() {
            self.busy.look_at_us = Some(self.now_us + LOOK_US);
            self.out.unsteady = true;
        }
    }

    /// Looks at the lanes if it is time. Returns when to look again.
    pub(super) fn busy_on_time(&mut self) -> Option<u64> {
        let at_us = self.busy.look_at_us?;
        if self.now_us < at_us {
            return Some(at_us);
        }
        let mut running = std::mem::take(&mut self.busy.sent);
        for no in self.lanes.numbers() {
            let lane = &self.lanes[no as usize];
            if !may_run_script(lane) {
                self.end_busy(no);
                continue;
            }
            running = true;
            if lane.is_busy() || lane.silent_for(self.now_us) >= LOOK_US {
                self.ask_whether_busy(no);
            }
        }
        self.busy.look_at_us = running.then_some(self.now_us + LOOK_US);
        self.busy.look_at_us
    }

    fn ask_whether_busy(&mut self, no: LaneNo) {
        let asked = self.busy.asked.iter().find(|(lane, _)| *lane == no);
        let line = match asked {
            Some((_, line)) => *line,
            None => {
                let shard = self.lanes[no as usize].shard();
                let Some(Some(route)) = self.table.shards.get(usize::from(shard)).cloned() else {
                    return;
                };
                let line = self.open_line(Opening {
                    user: Use::Busy(no),
                    shard,
                    epoch: route.epoch,
                    address: route.address,
                    login: Login {
                        username: route.username.clone(),
                        password: route.password.clone(),
                    },
                    protocol: Protocol::Resp2,
                });
                self.busy.asked.push((no, line));
                line
            }
        };
        // One question at a time: before its node has answered there is nothing to add.
        if self
            .lines
            .get(line)
            .is_some_and(|line| line.unsent_len() == 0)
        {
            self.write_line(line, |out| write::encode_command(out, &[b"PING"]));
        }
    }

    /// What became of such a question.
    pub(super) fn busy_event(&mut self, no: LaneNo, event: LineEvent<'_>) {
        match event {
            LineEvent::Ready => {}
            // It may have ended since the node said so.
            LineEvent::Reply(reply)
                if reply.starts_with(b"-BUSY") && may_run_script(&self.lanes[no as usize]) =>
            {
                let now_us = self.now_us;
                let lane = &mut self.lanes[no as usize];
                lane.note_alive(now_us);
                lane.set_busy(true);
                if self.busy.lanes.iter().all(|(lane, _)| *lane != no) {
                    let words = reply[1..].strip_suffix(b"\r\n").unwrap_or(&reply[1..]);
                    self.busy.lanes.push((no, words.to_vec()));
                    // Who waits for room hears it now.
                    self.out.freed = true;
                }
            }
            LineEvent::Reply(_) => self.end_busy(no),
            LineEvent::Lost(_) => {
                self.busy.asked.retain(|(lane, _)| *lane != no);
                self.end_busy(no);
            }
        }
    }

    /// The node of a lane says something else than that it is busy.
    #[cold]
    pub(super) fn end_busy(&mut self, no: LaneNo) {
        if let Some(at) = self.busy.asked.iter().position(|(lane, _)| *lane == no) {
            let (_, line) = self.busy.asked.swap_remove(at);
            self.close_line(line);
        }
        self.busy.lanes.retain(|(lane, _)| *lane != no);
        let lane = &mut self.lanes[no as usize];
        if lane.is_busy() {
            lane.set_busy(false);
            self.out.freed = true;
        }
    }

    /// A lane without room: if its node is busy, the client hears that.
    #[cold]
    pub(super) fn busy_words(&self, no: LaneNo) -> Option<Vec<u8>> {
        let found = self.busy.lanes.iter().find(|(lane, _)| *lane == no);
        found.map(|(_, words)| words.clone())
    }

    /// What a busy Redis refuses, whoever would answer it here: on a cluster, while the shard of
    /// commands without keys is busy.
    pub(super) fn refused_while_busy(&mut self, slot: u32, command: &Command) -> Option<Flow> {
        if self.busy.lanes.is_empty() || ALLOWED.contains(&command.name) {
            return None;
        }
        let keyless = self.table.keyless_shard();
        let mut lanes = self.busy.lanes.iter();
        let (_, words) = lanes.find(|(no, _)| self.lanes[*no as usize].shard() == keyless)?;
        let words = words.clone();
        if command.name == "exec" {
            self.take_transaction(slot);
            self.release_watch(slot);
            let text = [b"EXECABORT Transaction discarded because of: ", &words[..]].concat();
            return Some(self.reply_error(slot, &text));
        }
        Some(self.refuse(slot, &words))
    }
}
