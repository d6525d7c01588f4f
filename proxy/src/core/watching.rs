//! WATCH: the line on which a client's keys are watched, from WATCH to EXEC.
//!
//! Invariants: all keys that a client watches are of one shard, and watched over one line, where its
//! EXEC runs too. WATCH is answered before the client's next command is taken, and EXEC is sent
//! after its earlier ones were answered, so that what it read in between was watched. A watch whose
//! line is gone, or whose shard has another primary or takes no requests at the moment, counts as
//! touched: EXEC answers nil and nothing was executed. That is never wrong, because a client must
//! expect it at any time.

use super::Core;
use super::client::Client;
use super::dispatch::{CROSS_SLOT, Flow, NOT_SERVED};
use super::line::{LineEvent, LineNo, Use};
use super::spec::Request;
use crate::routing::{NO_SHARD, ShardNo};
use slotmesh_command::Command;
use slotmesh_resp::Protocol;

/// What a client watches.
#[derive(Debug)]
pub(super) struct Watching {
    pub(super) shard: ShardNo,
    /// `None`: it counts as touched, or is lent to another WATCH.
    pub(super) line: Option<LineNo>,
}

impl Client {
    fn watching_mut(&mut self) -> Option<&mut Watching> {
        self.extra.as_mut()?.watching.as_mut()
    }

    pub(super) fn watching(&self) -> Option<&Watching> {
        self.extra.as_ref()?.watching.as_ref()
    }

    fn take_watching(&mut self) -> Option<Watching> {
        let watching = self.extra.as_mut()?.watching.take();
        self.tidy_extra();
        watching
    }
}

impl Core {
    /// WATCH outside MULTI.
    pub(super) fn watch(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let shard = match self.shard_of_keys(command, request) {
            Ok(NO_SHARD) => return self.refuse(slot, NOT_SERVED.as_bytes()),
            Ok(shard) => shard,
            Err(text) => return self.refuse(slot, text.as_bytes()),
        };
        match self.sessions.get(slot).and_then(Client::watching) {
            Some(watching) if watching.shard != shard => self.refuse(slot, CROSS_SLOT.as_bytes()),
            Some(Watching { line: None, .. }) => self.reply_simple(slot, "OK"),
            _ => self.start_watch(slot, shard, request.frame),
        }
    }

    /// The line of a client's watch, for one more WATCH on it.
    pub(super) fn lend_watch(&mut self, client: u32, generation: u32, user: Use) -> Option<LineNo> {
        let client = self.sessions.get_same(client, generation)?;
        let no = client.watching_mut()?.line.take()?;
        self.lines.get_mut(no)?.user = user;
        Some(no)
    }

    /// True if the client watches anything, touched or not.
    pub(super) fn is_watching(&mut self, client: u32, generation: u32) -> bool {
        let client = self.sessions.get_same(client, generation);
        client.is_some_and(|client| client.watching().is_some())
    }

    /// A WATCH was executed over this line.
    pub(super) fn keep_watch(&mut self, client: u32, generation: u32, no: LineNo) {
        let shard = self.lines.get(no).map_or(NO_SHARD, |line| line.shard);
        match self.sessions.get_same(client, generation) {
            Some(owner) => {
                owner.extra_mut().watching = Some(Watching {
                    shard,
                    line: Some(no),
                });
                if let Some(line) = self.lines.get_mut(no) {
                    line.user = Use::Watch { client, generation };
                }
            }
            None => self.drop_private(no),
        }
    }

    pub(super) fn watch_event(
        &mut self,
        no: LineNo,
        client: u32,
        generation: u32,
        event: LineEvent<'_>,
    ) {
        match event {
            LineEvent::Ready => return,
            LineEvent::Lost(_) => {
                let watching = self.sessions.get_same(client, generation);
                if let Some(watching) = watching.and_then(|client| client.watching_mut()) {
                    let shard = watching.shard;
                    watching.line = None;
                    self.privates.forget(shard);
                }
                return;
            }
            LineEvent::Reply(_) => {} // nothing was asked: what the node says is not understood
        }
        self.drop_private(no);
        let client = self.sessions.get_same(client, generation);
        if let Some(watching) = client.and_then(Client::watching_mut) {
            watching.line = None;
        }
    }

    /// The client watches nothing any more.
    pub(super) fn release_watch(&mut self, slot: u32) {
        let client = self.sessions.get_mut(slot);
        if let Some(Watching { line: Some(no), .. }) = client.and_then(Client::take_watching) {
            self.write_own(no, &[b"UNWATCH"]);
            self.give_private(no);
        }
    }

    /// Takes a client's watch for its EXEC. `Err`: it counts as touched.
    pub(super) fn take_watch(&mut self, slot: u32) -> Option<Result<LineNo, ()>> {
        let watching = self.sessions.get_mut(slot)?.take_watching()?;
        let Some(no) = watching.line else {
            return Some(Err(()));
        };
        let lane = super::lane::lane_no(watching.shard, Protocol::Resp2);
        if !self.lanes[lane as usize].gate.admits() {
            self.drop_private(no);
            return Some(Err(()));
        }
        Some(Ok(no))
    }

    /// A new routing table: what was watched at older epochs counts as touched.
    pub(super) fn renew_watches(&mut self) {
        let is_old = |line: &super::line::Line| {
            let route = self.table.shards.get(usize::from(line.shard));
            let epoch = route.and_then(Option::as_ref).map(|route| route.epoch);
            epoch != Some(line.epoch)
        };
        let watches = self.lines.iter().filter_map(|(no, line)| match line.user {
            Use::Watch { client, generation } if is_old(line) => Some((no, client, generation)),
            _ => None,
        });
        let old: Vec<_> = watches.collect();
        for (no, client, generation) in old {
            self.drop_private(no);
            let client = self.sessions.get_same(client, generation);
            if let Some(watching) = client.and_then(Client::watching_mut) {
                watching.line = None;
            }
        }
    }

    /// A client leaves: its lines go.
    pub(super) fn release_private(&mut self, slot: u32) {
        let extra = self.sessions.get_mut(slot).and_then(|c| c.extra.as_mut());
        let Some(extra) = extra else { return };
        let (wait, watching) = (extra.wait.take(), extra.watching.take());
        if let Some(number) = wait {
            self.cancel_wait(number);
        }
        if let Some(Watching { line: Some(no), .. }) = watching {
            self.drop_private(no);
        }
    }
}
