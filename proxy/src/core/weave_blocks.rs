//! The queued commands of a transaction, sorted into one block for each shard.
//!
//! Invariant: a block begins with MULTI, ends with EXEC, and leaves the connection's database as it
//! found it: what SELECT did within is undone at its end.

use std::collections::VecDeque;

use slotmesh_resp::{Args, Parsed, RequestParser, write};

use super::Core;
use super::answer::error_line;
use super::client::Transaction;
use super::dispatch::NOT_SERVED;
use super::multi::Placement;
use super::retry::Effect;
use super::spec::{self, Request};
use crate::routing::{NO_SHARD, ShardNo};

pub(super) const NOT_HERE: &str = "ERR slotmesh: this command cannot be executed inside MULTI";

/// Where a queued command's reply comes from.
#[derive(Debug)]
pub(super) enum Place {
    /// The next reply of this block.
    Block(usize),
    /// The next reply of this block is ours: it is dropped.
    Own(usize),
    /// It is known.
    Ready(Vec<u8>),
    /// Of the proxy, to come.
    Proxy,
}

/// What goes to one shard.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) shard: ShardNo,
    /// From MULTI on; EXEC is added at the end.
    pub(super) frame: Vec<u8>,
    pub(super) commands: usize,
    pub(super) read_only: bool,
    /// Its database after what is in `frame`.
    pub(super) db: u16,
}

/// A transaction taken apart.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) places: Vec<Place>,
    pub(super) blocks: Vec<Block>,
    /// Frames of commands for the proxy.
    pub(super) local: VecDeque<Vec<u8>>,
    /// The client's database after it.
    pub(super) db: u16,
}

impl Parts {
    /// The shard's block, with `db` as its database at this point.
    pub(super) fn block(&mut self, shard: ShardNo, start_db: u16, db: u16) -> usize {
        let found = self.blocks.iter().position(|block| block.shard == shard);
        let at = found.unwrap_or_else(|| {
            let mut frame = Vec::new();
            write::encode_command(&mut frame, &[b"MULTI"]);
            self.blocks.push(Block {
                shard,
                frame,
                commands: 0,
                read_only: true,
                db: start_db,
            });
            self.blocks.len() - 1
        });
        if self.blocks[at].select(db) {
            self.places.push(Place::Own(at));
        }
        at
    }

    pub(super) fn end(&mut self, start_db: u16) {
        for block in &mut self.blocks {
            block.select(start_db);
            write::encode_command(&mut block.frame, &[b"EXEC"]);
        }
    }
}

impl Block {
    pub(super) fn select(&mut self, db: u16) -> bool {
        let other = self.db != db;
        if other {
            let number = db.to_string();
            write::encode_command(&mut self.frame, &[b"SELECT", number.as_bytes()]);
            self.commands += 1;
            self.db = db;
        }
        other
    }

    pub(super) fn effect(&self) -> Effect {
        if self.read_only {
            Effect::Read
        } else {
            Effect::Write
        }
    }
}

impl Core {
    /// Sorts the queued commands into blocks. The routes may have changed since they were queued.
    pub(super) fn take_apart(
        &self,
        transaction: &Transaction,
        db: u16,
        home: Option<ShardNo>,
    ) -> Parts {
        let mut parts = Parts {
            db,
            ..Parts::default()
        };
        let number = |id: &String| self.table.number_of(id);
        let usual = home.or(transaction.shard_id.as_ref().and_then(number));
        let usual = usual.unwrap_or(self.table.keyless_shard());
        if let Some(shard) = home {
            parts.block(shard, db, db); // also without a command: it tells whether a key was touched
        }
        let (mut args, mut at) = (Args::new(), 0);
        let frames = &transaction.frames;
        while let Ok(Parsed::Complete { consumed }) =
            RequestParser::new().parse(&frames[at..], &mut args)
        {
            let request = Request {
                frame: &frames[at..at + consumed],
                args: &args,
            };
            at += consumed;
            self.place(&mut parts, request, db, usual);
        }
        parts
    }

    fn place(&self, parts: &mut Parts, request: Request<'_>, start_db: u16, usual: ShardNo) {
        let Ok(command) = slotmesh_command::resolve(&request) else {
            return parts.places.push(Place::Ready(error_line(NOT_HERE))); // it was queued by mistake
        };
        let shard = match self.placement(command, request) {
            Placement::Shard(shard) => shard,
            Placement::Any => usual,
            Placement::Refused(text) => {
                return parts.places.push(Place::Ready(error_line(text)));
            }
            Placement::Select => {
                let mut reply = b"+OK\r\n".to_vec();
                match self.database_of(request.arg(1)) {
                    Ok(db) => parts.db = db,
                    Err(text) => reply = error_line(text),
                }
                return parts.places.push(Place::Ready(reply));
            }
            Placement::Proxy => {
                parts.local.push_back(request.frame.to_vec());
                return parts.places.push(Place::Proxy);
            }
        };
        if shard == NO_SHARD {
            return parts.places.push(Place::Ready(error_line(NOT_SERVED)));
        }
        let at = parts.block(shard, start_db, parts.db);
        let block = &mut parts.blocks[at];
        block.frame.extend_from_slice(request.frame);
        block.commands += 1;
        block.read_only &= spec::effect(command).repeatable();
        parts.places.push(Place::Block(at));
    }
}
