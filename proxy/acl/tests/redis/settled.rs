//! What a real Redis says of users, once the order in it is settled.

use slotmesh_command::lookup;

/// Rules of a selector with its single commands in alphabetical order, which is the order of a random
/// hash in Redis, and without those that Redis 7.0 does not have.
pub(crate) fn settled(rules: &str) -> String {
    let single = |rule: &&str| rule.starts_with(['+', '-']) && !rule[1..].starts_with('@');
    let (mut singles, others): (Vec<&str>, Vec<&str>) = rules.split(' ').partition(single);
    singles.retain(|rule| in_redis_7_0(&rule[1..]));
    singles.sort_unstable();
    [others, singles].concat().join(" ")
}

fn in_redis_7_0(name: &str) -> bool {
    let (name, sub) = name.split_once('|').unwrap_or((name, ""));
    let command = lookup(name.as_bytes()).unwrap();
    // A first argument is no subcommand.
    let sub = command.subcommand(sub.as_bytes()).unwrap_or(command);
    sub.in_redis_7_0()
}

/// A whole line of ACL LIST, each selector settled.
pub(crate) fn settled_line(line: &str) -> String {
    let parts = line.split(" (").map(|part| match part.strip_suffix(')') {
        Some(inside) => format!("{})", settled(inside)),
        None => settled(part),
    });
    parts.collect::<Vec<_>>().join(" (")
}
