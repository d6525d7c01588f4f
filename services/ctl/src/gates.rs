//! What an upgrade must not cost, shown before it does.

use crate::{
    render,
    views::{GateView, ShardProgressView},
};

/// What would pause the task, or make a shard go back, and how far that is, on lines of their own; empty:
/// nothing would.
pub(crate) fn table_of(shards: &[ShardProgressView]) -> String {
    let rows = shards.iter().flat_map(|s| {
        s.gates.iter().map(move |g| {
            [
                s.shard_id.clone(),
                g.name.clone(),
                number(g.before),
                number(g.now),
                number(g.limit),
                g.unit.clone(),
            ]
        })
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return String::new();
    }
    let header = ["SHARD", "GATE", "BEFORE", "NOW", "LIMIT", "UNIT"];
    format!("\n{}", render::table(header, rows))
}

/// As [`table_of`], of one shard on one line, beside its events.
pub(crate) fn line_of(shard: &ShardProgressView) -> String {
    let gate = |g: &GateView| {
        let (now, before, limit) = (number(g.now), number(g.before), number(g.limit));
        format!(
            "{} {now} (before {before}, limit {limit}) {}",
            g.name, g.unit
        )
    };
    let gates: Vec<String> = shard.gates.iter().map(gate).collect();
    format!(
        "      gates of shard {}: {}",
        shard.shard_id,
        gates.join("; ")
    )
}

fn number(number: Option<f64>) -> String {
    number.map_or_else(|| "-".to_owned(), |n| format!("{n:.1}"))
}

#[cfg(test)]
mod tests {
    use slotmesh_proto::task::v1 as task;

    use super::*;

    #[test]
    fn an_upgrade_under_way_shows_its_gates_before_one_breaks() {
        let gate = task::Gate {
            name: "Faults".into(),
            before: Some(3.0),
            now: None,
            limit: Some(106.0),
            unit: "in 10 s".into(),
        };
        let shard = ShardProgressView::from(task::ShardProgress {
            shard_id: "s-0".into(),
            gates: vec![gate],
            ..task::ShardProgress::default()
        });
        let line = line_of(&shard);
        assert!(
            line.ends_with("Faults - (before 3.0, limit 106.0) in 10 s"),
            "{line}"
        );
        let text = table_of(&[shard]);
        let last = text.lines().last().unwrap_or_default();
        let words: Vec<&str> = last.split_whitespace().collect();
        assert_eq!(
            words,
            ["s-0", "Faults", "3.0", "-", "106.0", "in", "10", "s"]
        );
        assert_eq!(table_of(&[]), "");
    }
}
