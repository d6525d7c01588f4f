//! How much a process learns: the bound is the process's, so this test has one of its own.
#![allow(clippy::unwrap_used)]

use slotmesh_command::{LEARNED_MAX, LearnError, Part, learn, learned, lookup};

fn entry(name: &str) -> Part {
    let text = |word: &str| Part::Text(word.as_bytes().to_vec());
    let numbers = [1, 1, 1].map(Part::Int);
    let mut fields = vec![
        text(name),
        Part::Int(-2),
        Part::List(vec![text("readonly")]),
    ];
    fields.extend(numbers);
    Part::List(fields)
}

#[test]
fn a_node_that_makes_up_names_takes_a_bounded_memory() {
    let names: Vec<String> = (0..5000).map(|number| format!("made.up{number}")).collect();
    let fits = names
        .iter()
        .take_while(|name| learn(name.as_bytes(), &entry(name)).is_ok());
    let fits = fits.count();
    assert_eq!(fits, LEARNED_MAX);
    assert_eq!(learned().count(), fits);
    for (at, name) in names.iter().enumerate() {
        let found = lookup(name.to_uppercase().as_bytes()).map(|command| command.name);
        assert_eq!(found, (at < fits).then_some(name.as_str()));
    }
    assert_eq!(
        learn(b"one.more", &entry("one.more")).unwrap_err(),
        LearnError::Full
    );
    // What is known stays usable.
    assert!(learn(names[0].as_bytes(), &entry(&names[0])).is_ok());
}
