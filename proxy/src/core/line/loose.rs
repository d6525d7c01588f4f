//! A line between two processes: without its socket, which travels beside it.
//!
//! Invariant: only a line that is logged in travels, with every byte that came or is still to be sent.

use slotmesh_resp::{Protocol, ReplyScanner};

use super::super::Core;
use super::{LINE_BIT, Line, LineNo, State, Use};

/// A line between two processes, without its socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LooseLine {
    pub shard_id: String,
    pub epoch: u64,
    pub db: u16,
    pub protocol: Protocol,
    pub own_replies: u32,
    pub node_id: Option<i64>,
    pub input: Vec<u8>,
    pub output: Vec<u8>,
}

impl Core {
    /// Takes a line that is logged in out, for another process. Its socket stays with the worker.
    pub(in super::super) fn loosen_line(&mut self, no: LineNo) -> Option<LooseLine> {
        let route = self
            .table
            .shards
            .get(usize::from(self.lines.get(no)?.shard));
        let shard_id = route?.as_ref()?.shard_id.clone();
        let index = no & !LINE_BIT;
        let place = self.lines.lines.get_mut(index as usize)?;
        let mut line = place.take_if(|line| line.is_up())?;
        self.lines.free.push(index);
        line.output.drain(..line.sent);
        Some(LooseLine {
            shard_id,
            epoch: line.epoch,
            db: line.db,
            protocol: line.protocol,
            own_replies: line.own_replies,
            node_id: line.node_id,
            input: line.input,
            output: line.output,
        })
    }

    /// Takes a line in that another process has logged in. `None`: there is no such shard.
    pub(in super::super) fn fasten_line(&mut self, loose: LooseLine, user: Use) -> Option<LineNo> {
        let shard = self.table.number_of(&loose.shard_id)?;
        let login = self.table.shards[usize::from(shard)].as_ref()?.login();
        let index = self.lines.free.pop().unwrap_or_else(|| {
            self.lines.lines.push(None);
            (self.lines.lines.len() - 1) as u32
        });
        let no = index | LINE_BIT;
        self.lines.opened += 1;
        self.lines.lines[index as usize] = Some(Line {
            user,
            shard,
            epoch: loose.epoch,
            db: loose.db,
            protocol: loose.protocol,
            own_replies: loose.own_replies,
            node_id: loose.node_id,
            serial: self.lines.opened,
            login,
            state: State::Up,
            queued: Vec::new(),
            output: loose.output,
            sent: 0,
            input: loose.input,
            scanner: ReplyScanner::new(),
            touched: false,
        });
        self.touch_line(no);
        Some(no)
    }
}
