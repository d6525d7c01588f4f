//! MULTI, EXEC and DISCARD of a client: commands are queued here and go to their shard as one block.
//!
//! Invariant: nothing of a transaction is sent before EXEC, and nothing at all if a command was
//! refused while it was queued.

use slotmesh_command::{Class, Command};
use slotmesh_resp::write;

use super::Core;
use super::client::Transaction;
use super::dispatch::{CROSS_SLOT, Flow, NOT_SERVED};
use super::queue::Kind;
use super::retry::Effect;
use super::spec::{self, Request};
use super::transaction::{TRANSACTION_BYTES_MAX, write_block};
use crate::routing::{NO_SHARD, ShardNo};

impl Core {
    /// A command of the transaction class outside a transaction.
    pub(super) fn begin_transaction(&mut self, slot: u32, command: &Command) -> Flow {
        match command.name {
            "multi" => {
                let transaction = Transaction {
                    read_only: true,
                    ..Transaction::default()
                };
                if let Some(client) = self.sessions.get_mut(slot) {
                    client.state.transaction = Some(Box::new(transaction));
                }
                self.reply_simple(slot, "OK")
            }
            "exec" => self.reply_error(slot, b"ERR EXEC without MULTI"),
            "discard" => self.reply_error(slot, b"ERR DISCARD without MULTI"),
            // Nothing can be watched yet.
            "unwatch" => self.reply_simple(slot, "OK"),
            _ => self.unsupported(slot, command),
        }
    }

    /// Any command between MULTI and EXEC.
    pub(super) fn in_transaction(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        match (command.class, command.name) {
            (_, "multi") => self.reply_error(slot, b"ERR MULTI calls can not be nested"),
            (_, "watch") => self.reply_error(slot, b"ERR WATCH inside MULTI is not allowed"),
            (_, "discard") => {
                self.take_transaction(slot);
                self.reply_simple(slot, "OK")
            }
            (_, "exec") => self.exec(slot),
            (_, "quit" | "reset") => self.local(slot, command, request),
            // These mean the same on any node.
            (_, "ping" | "echo" | "time" | "unwatch") => self.enqueue(slot, None, command, request),
            (Class::SingleKey | Class::SplitMerge(_) | Class::Computed | Class::SameSlot, _) => {
                self.enqueue_keyed(slot, command, request)
            }
            // Inside a transaction nothing waits.
            (Class::Blocking, name) if !name.starts_with("wait") => {
                self.enqueue_keyed(slot, command, request)
            }
            (_, name) => {
                let text = format!("ERR slotmesh: '{name}' is not supported inside MULTI yet");
                self.refuse(slot, text.as_bytes())
            }
        }
    }

    fn enqueue_keyed(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        if !spec::is_permitted(command) {
            return self.unsupported(slot, command);
        }
        // No key (a script without any): it goes where the others of the transaction go.
        if command.keys(&request).is_ok_and(|keys| keys.is_empty()) {
            return self.enqueue(slot, None, command, request);
        }
        match self.shard_of_keys(command, request) {
            Ok(shard) => self.enqueue(slot, Some(shard), command, request),
            Err(text) => self.refuse(slot, text.as_bytes()),
        }
    }

    pub(super) fn take_transaction(&mut self, slot: u32) -> Option<Box<Transaction>> {
        self.sessions.get_mut(slot)?.state.transaction.take()
    }

    fn enqueue(
        &mut self,
        slot: u32,
        shard: Option<ShardNo>,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let shard_id = match shard {
            Some(NO_SHARD) => return self.refuse(slot, NOT_SERVED.as_bytes()),
            Some(no) => self.table.shards[usize::from(no)]
                .as_ref()
                .map(|s| s.shard_id.clone()),
            None => None,
        };
        let Some(transaction) = self
            .sessions
            .get_mut(slot)
            .and_then(|c| c.state.transaction.as_mut())
        else {
            return Flow::Taken;
        };
        if transaction.frames.len() + request.frame.len() > TRANSACTION_BYTES_MAX {
            return self.refuse(slot, b"ERR slotmesh: the transaction is too large");
        }
        if transaction.shard_id.is_some() && shard_id.is_some() && transaction.shard_id != shard_id
        {
            return self.refuse(slot, CROSS_SLOT.as_bytes());
        }
        transaction.shard_id = shard_id.or(transaction.shard_id.take());
        transaction.read_only &= spec::effect(command).repeatable();
        transaction.commands += 1;
        transaction.frames.extend_from_slice(request.frame);
        self.reply_simple(slot, "QUEUED")
    }

    fn exec(&mut self, slot: u32) -> Flow {
        let Some(transaction) = self.take_transaction(slot) else {
            return Flow::Taken;
        };
        if transaction.dirty {
            let text = b"EXECABORT Transaction discarded because of previous errors.";
            return self.reply_error(slot, text);
        }
        if transaction.commands == 0 {
            return self.reply_with(slot, |out| write::write_array_header(out, 0));
        }
        let shard = match &transaction.shard_id {
            None => self.table.keyless_shard(),
            Some(id) => self.table.number_of(id).unwrap_or(NO_SHARD),
        };
        let effect = if transaction.read_only {
            Effect::Read
        } else {
            Effect::Write
        };
        let mut block = self.sessions.pool.take();
        let replies = write_block(&mut block, &transaction);
        let flow = self.forward(slot, shard, Kind::Block, effect, replies, &block);
        self.sessions.pool.give(block);
        if flow != Flow::Taken
            && let Some(client) = self.sessions.get_mut(slot)
        {
            client.state.transaction = Some(transaction); // EXEC is shown again later
        }
        flow
    }
}
