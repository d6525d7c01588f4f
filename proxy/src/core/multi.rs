//! MULTI, EXEC and DISCARD of a client: commands are queued here and sent at EXEC.
//!
//! Invariant: nothing of a transaction is sent before EXEC, and nothing at all if a command was
//! refused while it was queued. A transaction of one shard whose commands a node executes as they
//! are goes as one block over the shared connection, without waiting for what is in flight; every
//! other one is taken apart by [`super::weave`].

use slotmesh_command::{Class, Command, CommandError, Flag};
use slotmesh_resp::write;

use super::Core;
use super::client::{Client, Transaction};
use super::dispatch::{CROSS_SLOT, Flow, NOT_SERVED};
use super::health::Admission;
use super::queue::Kind;
use super::retry::Effect;
use super::spec::{self, Request};
use super::transaction::{TRANSACTION_BYTES_MAX, because, write_block};
use crate::routing::{NO_SHARD, ShardNo};

pub(super) const ABORTED: &[u8] = b"EXECABORT Transaction discarded because of previous errors.";

/// Where a command of a transaction is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    /// In the block of this shard.
    Shard(ShardNo),
    /// In any block: it means the same everywhere.
    Any,
    /// It changes the database of those behind it.
    Select,
    /// By the proxy, after the blocks.
    Proxy,
    /// Nowhere, in a transaction.
    Refused(&'static str),
}

impl Core {
    /// A command of the transaction class outside a transaction.
    pub(super) fn begin_transaction(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
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
            "watch" => self.watch(slot, command, request),
            "unwatch" => {
                self.release_watch(slot);
                self.reply_simple(slot, "OK")
            }
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
        match command.name {
            "multi" => self.reply_error(slot, b"ERR MULTI calls can not be nested"),
            "watch" => self.reply_error(slot, b"ERR WATCH inside MULTI is not allowed"),
            "discard" => {
                self.take_transaction(slot);
                self.release_watch(slot);
                self.reply_simple(slot, "OK")
            }
            "exec" => match self.admission(command) {
                Admission::Queued => self.exec(slot),
                Admission::Unknown => Flow::NoRoom,
                Admission::Refused(error) => {
                    self.take_transaction(slot);
                    self.release_watch(slot);
                    self.reply_with(slot, |out| out.extend_from_slice(&because(&error)))
                }
            },
            "reset" => {
                self.release_watch(slot);
                self.local(slot, command, request)
            }
            "quit" => self.local(slot, command, request),
            _ if command.flags.has(Flag::NoMulti) => {
                self.refuse(slot, b"ERR Command not allowed inside a transaction")
            }
            _ => self.enqueue(slot, command, request),
        }
    }

    /// EXEC with arguments ends the transaction, unlike other commands in a wrong number of words.
    pub(super) fn misspelt(&mut self, slot: u32, error: &CommandError) -> Flow {
        let open = (self.sessions.get(slot)).is_some_and(|c| c.state.transaction.is_some());
        if open && *error == CommandError::WrongArity("exec") {
            self.take_transaction(slot);
            self.release_watch(slot);
            let text =
                b"EXECABORT Transaction discarded because of: wrong number of arguments for \
                'exec' command";
            return self.reply_error(slot, text);
        }
        self.refuse(slot, &error.text())
    }

    /// Where a command of a transaction goes.
    pub(super) fn placement(&self, command: &Command, request: Request<'_>) -> Placement {
        let one_shard = self.table.only_shard().is_some();
        match command.name {
            "select" => return Placement::Select,
            "ping" | "echo" | "time" | "unwatch" => return Placement::Any,
            "publish" | "spublish" if one_shard => return Placement::Any,
            // They touch no key, so their place among the others does not matter.
            "script|load" | "script|flush" | "function|load" | "function|delete"
            | "function|flush" | "function|restore" | "script|exists"
                if !one_shard =>
            {
                return Placement::Proxy;
            }
            _ if !spec::is_permitted(command) => return Placement::Proxy,
            _ => {}
        }
        match command.class {
            Class::Walk if command.only_key().is_none() && one_shard => Placement::Any,
            // Its effect on, or of, the other commands' keys could not be in its place.
            Class::Walk if command.only_key().is_none() => Placement::Refused(CROSS_SLOT),
            Class::SingleKey
            | Class::Walk
            | Class::SplitMerge(_)
            | Class::Computed
            | Class::SameSlot
            | Class::Blocking => {
                // Without a key (a script may have none) it goes where the others go.
                if command.keys(&request).is_ok_and(|keys| keys.is_empty()) {
                    let waits = command.name.starts_with("wait") && !one_shard;
                    return if waits {
                        Placement::Refused(CROSS_SLOT)
                    } else {
                        Placement::Any
                    };
                }
                match self.shard_of_keys(command, request) {
                    Ok(NO_SHARD) => Placement::Refused(NOT_SERVED),
                    Ok(shard) => Placement::Shard(shard),
                    Err(text) => Placement::Refused(text),
                }
            }
            Class::Keyless => Placement::Any,
            Class::AllShards(_) if one_shard => Placement::Any,
            Class::AllShards(_) => Placement::Refused(CROSS_SLOT),
            _ => Placement::Proxy,
        }
    }

    pub(super) fn take_transaction(&mut self, slot: u32) -> Option<Box<Transaction>> {
        self.sessions.get_mut(slot)?.state.transaction.take()
    }

    fn enqueue(&mut self, slot: u32, command: &'static Command, request: Request<'_>) -> Flow {
        let placement = self.placement(command, request);
        let shard_id = match placement {
            Placement::Refused(text) => return self.refuse(slot, text.as_bytes()),
            Placement::Shard(no) => {
                let watching = self.sessions.get(slot).and_then(Client::watching);
                if watching.is_some_and(|watching| watching.shard != no) {
                    return self.refuse(slot, CROSS_SLOT.as_bytes());
                }
                let route = self.table.shards[usize::from(no)].as_ref();
                route.map(|route| route.shard_id.clone())
            }
            _ => None,
        };
        let may_change = self.may_change_data(command, request);
        match self.admission(command) {
            Admission::Queued => {}
            Admission::Unknown => return Flow::NoRoom,
            Admission::Refused(error) => {
                self.spoil(slot);
                return self.reply_with(slot, |out| out.extend_from_slice(&error));
            }
        }
        let transaction = self.sessions.get_mut(slot);
        let Some(transaction) = transaction.and_then(|c| c.state.transaction.as_mut()) else {
            return Flow::Taken;
        };
        if transaction.frames.len() + request.frame.len() > TRANSACTION_BYTES_MAX {
            return self.refuse(slot, b"ERR slotmesh: the transaction is too large");
        }
        let other = transaction.shard_id.is_some() && shard_id.is_some();
        transaction.mixed |= matches!(placement, Placement::Select | Placement::Proxy)
            || other && transaction.shard_id != shard_id;
        transaction.shard_id = transaction.shard_id.take().or(shard_id);
        transaction.read_only &= spec::effect(command).repeatable();
        transaction.may_change |= may_change;
        transaction.commands += 1;
        transaction.frames.extend_from_slice(request.frame);
        self.reply_simple(slot, "QUEUED")
    }

    /// EXEC must abort.
    fn spoil(&mut self, slot: u32) {
        let client = self.sessions.get_mut(slot);
        if let Some(transaction) = client.and_then(|c| c.state.transaction.as_mut()) {
            transaction.dirty = true;
        }
    }

    fn exec(&mut self, slot: u32) -> Flow {
        let Some(transaction) = self.take_transaction(slot) else {
            return Flow::Taken;
        };
        let flow = self.exec_taken(slot, &transaction);
        if flow != Flow::Taken
            && let Some(client) = self.sessions.get_mut(slot)
        {
            client.state.transaction = Some(transaction); // EXEC is shown again later
        }
        flow
    }

    fn exec_taken(&mut self, slot: u32, transaction: &Transaction) -> Flow {
        if transaction.dirty {
            self.release_watch(slot);
            return self.reply_error(slot, ABORTED);
        }
        let watching = self.sessions.get(slot).and_then(Client::watching).is_some();
        if watching || transaction.mixed {
            return self.exec_woven(slot, transaction, watching);
        }
        if transaction.commands == 0 {
            return self.reply_with(slot, |out| write::write_array_header(out, 0));
        }
        let shard = match &transaction.shard_id {
            None => self.table.keyless_shard(),
            Some(id) => self.table.number_of(id).unwrap_or(NO_SHARD),
        };
        if let Some(script) = self.as_script(slot, transaction) {
            return self.forward(slot, shard, Kind::Single, Effect::Script, 0, &script);
        }
        let effect = if transaction.read_only {
            Effect::Read
        } else {
            Effect::Write
        };
        let mut block = self.sessions.pool.take();
        let replies = write_block(&mut block, transaction);
        let flow = self.forward(slot, shard, Kind::Block, effect, replies, &block);
        self.sessions.pool.give(block);
        flow
    }
}
