//! What a proxy of a cluster instance does with a command: the routing class, read from `classes.txt`.
//!
//! Invariant: a class says where a command goes, never how it is executed. A `standard` instance has
//! one shard, where everything but `Proxy` and `Refused` simply goes.

/// The routing class of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// To the owner of its only key's slot ([`crate::Command::only_key`]).
    SingleKey,
    /// Split by shard, sent in parallel, the replies merged.
    SplitMerge(Merge),
    /// As it is if one shard owns all keys; else operands are fetched and the proxy computes.
    Computed,
    /// All keys in one slot's shard, or `CROSSSLOT`; with no key at all, to any shard.
    SameSlot,
    /// To every shard.
    AllShards(Gather),
    /// From shard to shard: SCAN's cursor carries the shard, RANDOMKEY picks one.
    Walk,
    /// To the shard whose index is its first argument (IINFO, ISCAN, …).
    ByIndex,
    PubSub,
    /// MULTI and what goes with it: state of the client's session.
    Transaction,
    /// On a dedicated connection, if it waits at all ([`crate::Command::may_wait`]); like `SameSlot` if not.
    Blocking,
    /// A dedicated connection to every shard, merged.
    Monitor,
    /// Answered by the proxy, out of its own knowledge.
    Proxy,
    /// Any one shard can answer for all.
    Keyless,
    /// Never sent; the text says what to use instead.
    Refused(&'static str),
}

/// How the parts of a split command become one reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merge {
    /// One value a key, in the order of the keys.
    Mget,
    /// OK once every part is OK. Arguments come in pairs.
    Mset,
    /// The sum of integers.
    Sum,
}

/// How the replies of all shards become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gather {
    /// The sum of integers.
    Sum,
    /// One array of all members.
    Concat,
    /// The first reply if none is an error, else the first error.
    AllOk,
    /// The first reply that is no error, else the first error.
    AnyOk,
    /// An array of integers: at each place the smallest one (SCRIPT EXISTS: there only if on all).
    EachMin,
}

/// One line of `classes.txt`: a class and the commands that are of it.
pub(crate) fn parse_line(line: &'static str) -> (Class, impl Iterator<Item = &'static str>) {
    // With its spaces: a subcommand is written `name|sub`.
    let mut columns = line.split(" | ").map(str::trim);
    let mut column = || columns.next();
    let (class, names, text) = (
        column().unwrap_or_default(),
        column().unwrap_or_default(),
        column(),
    );
    let class = match (class, text) {
        ("split mget", None) => Class::SplitMerge(Merge::Mget),
        ("split mset", None) => Class::SplitMerge(Merge::Mset),
        ("split sum", None) => Class::SplitMerge(Merge::Sum),
        ("computed", None) => Class::Computed,
        ("same-slot", None) => Class::SameSlot,
        ("all sum", None) => Class::AllShards(Gather::Sum),
        ("all concat", None) => Class::AllShards(Gather::Concat),
        ("all ok", None) => Class::AllShards(Gather::AllOk),
        ("all any-ok", None) => Class::AllShards(Gather::AnyOk),
        ("all each-min", None) => Class::AllShards(Gather::EachMin),
        ("walk", None) => Class::Walk,
        ("by-index", None) => Class::ByIndex,
        ("pubsub", None) => Class::PubSub,
        ("transaction", None) => Class::Transaction,
        ("blocking", None) => Class::Blocking,
        ("monitor", None) => Class::Monitor,
        ("proxy", None) => Class::Proxy,
        ("keyless", None) => Class::Keyless,
        ("refused", Some(text)) => Class::Refused(text),
        _ => panic!("classes.txt: no such class: {line:?}"),
    };
    (class, names.split_ascii_whitespace())
}
