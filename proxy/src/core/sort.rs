//! SORT's BY and GET patterns on an instance of several shards.
//!
//! Invariant: a node never forms a key from a pattern that may belong to another shard: it would find
//! nothing there, and the client would get a wrong order without a word.

use slotmesh_command::{Command, PatternOption};

use super::Core;
use super::spec::Request;
use crate::routing::ShardNo;

impl Core {
    /// Refuses a call whose patterns may form keys of other shards than `shard`, in the words that Redis
    /// has for it in cluster mode.
    pub(super) fn check_patterns(
        &self,
        command: &Command,
        request: Request<'_>,
        shard: ShardNo,
    ) -> Result<(), &'static str> {
        if self.table.only_shard().is_some() {
            return Ok(());
        }
        let strays = |tag: Option<&[u8]>| tag.is_none_or(|tag| self.table.shard_of(tag) != shard);
        let stray = command
            .patterns(&request)
            .find(|pattern| strays(pattern.hash_tag));
        match stray.map(|pattern| pattern.option) {
            None => Ok(()),
            Some(PatternOption::By) => Err("ERR BY option of SORT denied in cluster mode."),
            Some(PatternOption::Get) => Err("ERR GET option of SORT denied in cluster mode."),
        }
    }
}
