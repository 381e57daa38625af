//! One batch of changes to a table, in the form that the kernel takes.
//!
//! In: sets, chains, rules and elements. Out: a buffer for one `send`, and for a trial also the subject of each
//! message.

use nftnl::{Chain, MsgType, NlMsg, Policy, Rule, Table, nftnl_sys::libc};

use super::{
    messages::{ChainMessage, CounterMessage, ElementsMessage, Named, NamedMessage, SetMessage},
    objects::{Bytes, ChainSpec, Element, Expr, SetSpec, Value, c_string},
};

/// The subject of one message of a batch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    Table,
    /// A set, a chain, rules of a chain, or an element that leads to a chain.
    Object(String),
    /// An element of a set.
    Element(String, Bytes),
}

/// A batch of changes to one table, applied by the kernel as a whole or not at all.
pub(crate) struct Batch<'a> {
    messages: nftnl::Batch,
    table: &'a Table,
    sets: u32,
    /// The subject of each message, in a trial.
    subjects: Option<Vec<Subject>>,
}

/// Most bytes of elements in one message: the list of elements is one attribute, which can have 64 KiB.
const BYTES_A_MESSAGE: usize = 60_000;

impl Element {
    /// An upper bound of the element's bytes in a message: at most six attribute headers and three paddings.
    fn bytes(&self) -> usize {
        let value = match &self.value {
            Value::None => 0,
            Value::Data(bytes) => bytes.len(),
            Value::Accept(_) => 8,
            Value::Goto(chain) => 8 + chain.len() + 1,
        };
        6 * 4 + 3 * 3 + self.key.len() + self.key_end.as_ref().map_or(0, |end| end.len()) + value
    }
}

/// The first elements that fit in one message, at least one, and the rest.
fn split_message(elements: &[Element]) -> (&[Element], &[Element]) {
    let mut bytes = 0;
    let fits = elements.iter().position(|element| {
        bytes += element.bytes();
        bytes > BYTES_A_MESSAGE
    });
    elements.split_at(fits.unwrap_or(elements.len()).max(1).min(elements.len()))
}

impl<'a> Batch<'a> {
    pub(crate) fn new(table: &'a Table) -> Self {
        Self { messages: nftnl::Batch::new(), table, sets: 0, subjects: None }
    }

    /// A batch for a trial, with a message for each element, because the kernel reports each message that it refuses.
    pub(crate) fn for_trial(table: &'a Table) -> Self {
        Self { subjects: Some(Vec::new()), ..Self::new(table) }
    }

    fn push(&mut self, message: &impl NlMsg, kind: MsgType, subject: impl FnOnce() -> Subject) {
        self.messages.add(message, kind);
        if let Some(subjects) = &mut self.subjects {
            subjects.push(subject());
        }
    }

    pub(crate) fn add_table(&mut self) {
        self.push(self.table, MsgType::Add, || Subject::Table);
    }

    pub(crate) fn delete_table(&mut self) {
        self.push(self.table, MsgType::Del, || Subject::Table);
    }

    pub(crate) fn add_set(&mut self, spec: &SetSpec) {
        self.sets += 1;
        let message = SetMessage { table: self.table, spec, id: self.sets };
        self.push(&message, MsgType::Add, || Subject::Object(spec.name.clone()));
    }

    pub(crate) fn delete_set(&mut self, name: &str) {
        let message = NamedMessage { table: self.table, object: Named::Set, name: c_string(name) };
        self.push(&message, MsgType::Del, || Subject::Object(name.to_owned()));
    }

    /// Adds a named counter, at zero. The table must have no counter of this name.
    pub(crate) fn add_counter(&mut self, name: &str) {
        let message = CounterMessage { table: self.table, name: c_string(name) };
        self.push(&message, MsgType::Add, || Subject::Object(name.to_owned()));
    }

    pub(crate) fn add_chain(&mut self, spec: &ChainSpec) {
        let subject = || Subject::Object(spec.name.clone());
        if !spec.userdata.is_empty() {
            return self.push(&ChainMessage { table: self.table, spec }, MsgType::Add, subject);
        }
        let mut chain = Chain::new(c_string(&spec.name), self.table);
        if let Some((kind, hook, priority)) = spec.hook {
            chain.set_type(kind);
            chain.set_hook(hook, priority);
            chain.set_policy(Policy::Accept);
        }
        self.push(&chain, MsgType::Add, subject);
    }

    pub(crate) fn delete_chain(&mut self, name: &str) {
        let chain = Chain::new(c_string(name), self.table);
        self.push(&chain, MsgType::Del, || Subject::Object(name.to_owned()));
    }

    /// Removes every rule of a chain.
    pub(crate) fn flush_chain(&mut self, name: &str) {
        let message = NamedMessage { table: self.table, object: Named::RulesOf, name: c_string(name) };
        self.push(&message, MsgType::Del, || Subject::Object(name.to_owned()));
    }

    /// Replaces the rules of a chain.
    pub(crate) fn replace_rules(&mut self, name: &str, rules: &[Vec<Expr>]) {
        self.flush_chain(name);
        rules.iter().for_each(|rule| self.add_rule(name, rule));
    }

    /// Appends a rule to a chain.
    pub(crate) fn add_rule(&mut self, name: &str, expressions: &[Expr]) {
        let chain = Chain::new(c_string(name), self.table);
        let mut rule = Rule::new(&chain);
        for expression in expressions {
            rule.add_expr(expression);
        }
        self.push(&rule, MsgType::Add, || Subject::Object(name.to_owned()));
    }

    /// Adds elements. The batch fails with `EEXIST` or `EBUSY` if the set has one of the keys.
    pub(crate) fn add_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(set, elements, MsgType::Add, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
    }

    /// Adds the elements that the map does not have. The batch fails if the map has a key with another value.
    pub(crate) fn add_missing_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(set, elements, MsgType::Add, libc::NLM_F_CREATE);
    }

    /// Removes elements by key; their values do not matter.
    pub(crate) fn delete_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(set, elements, MsgType::Del, 0);
    }

    /// Removes every element of a set.
    pub(crate) fn flush_set(&mut self, set: &str) {
        let (table, name, kind) = (self.table, c_string(set), MsgType::Del);
        let message = ElementsMessage { table, set: &name, elements: &[], kind, flags: 0 };
        self.push(&message, kind, || Subject::Object(set.to_owned()));
    }

    fn elements(&mut self, set: &str, elements: &[Element], kind: MsgType, flags: i32) {
        let name = c_string(set);
        let mut rest = elements;
        while !rest.is_empty() {
            let (elements, behind) =
                if self.subjects.is_some() { rest.split_at(1) } else { split_message(rest) };
            let message = ElementsMessage { table: self.table, set: &name, elements, kind, flags };
            self.push(&message, kind, || match elements {
                [Element { value: Value::Goto(chain), .. }] => Subject::Object(chain.clone()),
                [Element { key, .. }, ..] => Subject::Element(set.to_owned(), key.clone()),
                [] => Subject::Object(set.to_owned()),
            });
            rest = behind;
        }
    }

    /// The batch as one buffer, because its parts must reach the kernel in one system call.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.finish_trial().0
    }

    /// A batch that the kernel checks and takes back, with the subject of each message between its first and last one.
    pub(crate) fn finish_trial(self) -> (Vec<u8>, Vec<Subject>) {
        let mut buffer = Vec::new();
        for page in &self.messages.finalize() {
            buffer.extend_from_slice(page);
        }
        match self.subjects {
            // The kernel takes a batch back if its last message is missing.
            Some(subjects) => {
                const LAST: usize = 16 + 4;
                buffer.truncate(buffer.len().saturating_sub(LAST));
                (buffer, subjects)
            }
            None => (buffer, Vec::new()),
        }
    }
}
