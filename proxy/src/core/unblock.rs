//! CLIENT UNBLOCK: ends a command that waits.
//!
//! Invariant: whether the command ends by this or by what it waited for is decided in one place: at
//! its node if it is there, in the proxy if it is not. A connection that was asked to be unblocked
//! is not used again, so that a late request cannot end another client's command.

use slotmesh_resp::{Protocol, write};
use smallvec::SmallVec;

use super::Core;
use super::line::{LineEvent, LineNo, Opening, Use};
use super::waiting::{Part, Purpose, State, Wait};

/// How soon to look again for the number of a connection that has just logged in.
pub(super) const RETRY_US: u64 = 1_000;
pub(super) const UNBLOCKED: &str = "UNBLOCKED client unblocked via CLIENT UNBLOCK";

/// How CLIENT UNBLOCK ends a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unblock {
    Timeout,
    Error,
}

impl Core {
    /// CLIENT UNBLOCK for a client of this worker. False if it does not wait. Whether the command
    /// ends by this or by what it waited for is decided by its node.
    pub(super) fn unblock(&mut self, client_id: u64, how: Unblock) -> bool {
        let is_it = |wait: &Wait| {
            let client = self.sessions.get(wait.client);
            wait.purpose != Purpose::Watch
                && client
                    .is_some_and(|c| c.generation == wait.generation && c.state.id == client_id)
        };
        let found = |wait: &Option<Wait>| wait.as_ref().is_some_and(is_it);
        let Some(number) = self.waits.all.iter().position(found) else {
            return false;
        };
        self.send_unblock(number as u32, how);
        true
    }

    pub(super) fn send_unblock(&mut self, number: u32, how: Unblock) {
        let Some(wait) = self.waits.get(number) else {
            return;
        };
        let is_held = |part: &Part| !matches!(part.state, State::Issued { .. });
        if wait.parts.iter().all(is_held) {
            let reply = wait.unblocked(how);
            return self.end_wait(number, &reply);
        }
        let parts = wait.parts.iter().filter_map(|part| match part.state {
            State::Issued { line, .. } => Some(line),
            _ => None,
        });
        let lines: SmallVec<[LineNo; 4]> = parts.collect();
        let known = |no: &LineNo| {
            self.lines
                .get(*no)
                .is_some_and(|line| line.node_id.is_some())
        };
        let all_known = lines.iter().all(known);
        if let Some(wait) = self.waits.get(number) {
            // Asked again soon if a number is missing; the command may already be at the node.
            wait.unblock = Some(how);
        }
        if !all_known {
            self.waits.list(number);
            self.out.unsteady = true;
            return;
        }
        if let Some(wait) = self.waits.get(number) {
            wait.unblock_asked = true;
        }
        for no in lines {
            self.ask_unblock(no, how);
        }
    }

    /// Asks a line's node to end what waits there, over a line to the same node.
    fn ask_unblock(&mut self, no: LineNo, how: Unblock) {
        let Some(line) = self.lines.get(no) else {
            return;
        };
        let (shard, epoch, id) = (line.shard, line.epoch, line.node_id.unwrap_or(0));
        let route = self.table.shards.get(usize::from(shard)).cloned().flatten();
        // At an older epoch the node is on its way to end it by itself.
        let Some(route) = route.filter(|route| route.epoch == epoch) else {
            return;
        };
        let asking = self.open_line(Opening {
            user: Use::Unblock,
            shard,
            epoch,
            address: route.address,
            login: route.login(),
            protocol: Protocol::Resp2,
        });
        let how: &[u8] = match how {
            Unblock::Timeout => b"TIMEOUT",
            Unblock::Error => b"ERROR",
        };
        let id = id.to_string();
        self.write_line(asking, |out| {
            write::encode_command(out, &[b"CLIENT", b"UNBLOCK", id.as_bytes(), how]);
        });
    }

    pub(super) fn unblock_event(&mut self, no: LineNo, event: LineEvent<'_>) {
        if let LineEvent::Reply(_) = event {
            self.close_line(no);
        }
    }
}
