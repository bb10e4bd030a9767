//! What tests of this crate share.

use std::{io, time::SystemTime};

use crate::{
    Host,
    eval::{Evaluator, Scope},
    functions::encode,
    source::{Expr, Source},
};

/// A host with nothing.
pub(crate) struct Nowhere;

impl Host for Nowhere {
    fn env(&self, _: &str) -> Option<String> {
        None
    }

    fn read(&self, _: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn home(&self) -> Option<String> {
        None
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn random(&self, bytes: &mut [u8]) -> shipway_fault::Result<()> {
        bytes.fill(7);
        Ok(())
    }
}

/// The value of `expression` in JSON, or what is wrong with it.
pub(crate) fn evaluate(host: &dyn Host, expression: &str) -> String {
    let source = match Source::hcl("x.hcl", &format!("x = {expression}\n"), 0) {
        Ok(source) => source,
        Err(failed) => return format!("error {}", failed.1.text),
    };
    let body = source.body(0).unwrap();
    let expr: Expr<'_> = body.attribute("x").unwrap().expr;
    match Evaluator::new(host).value(expr, &Scope::default()) {
        Ok(value) => encode(&value),
        Err(problem) => format!("error {}", problem.text),
    }
}
