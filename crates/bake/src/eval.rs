//! Evaluation of expressions and templates.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

use hcl_edit::{
    expr::{
        BinaryOperator, Expression, ForExpr, FuncCall, ObjectKey, Traversal, TraversalOperator,
        UnaryOperator,
    },
    template::{Directive, Element, Strip, Template},
};

use crate::{
    Host,
    convert::{convert, unify},
    functions,
    json::Json,
    number::{self, Number},
    operations::{attribute, binary, bool_of, entries, index, number_of},
    problem::{Outcome, Problem, SourceRange},
    source::{Expr, place},
    types,
    value::{Type, Value},
};

/// Expressions within expressions, variables and functions, at most.
pub(crate) const MAX_DEPTH: usize = 160;
/// Collections within collections, at most.
pub(crate) const MAX_VALUE_DEPTH: usize = 128;
/// Expressions that are evaluated for one definition, at most.
const MAX_STEPS: u64 = 5_000_000;
/// Bytes of texts and elements of collections that are made for one definition, at most.
const MAX_SIZE: u64 = 256 << 20;
/// What an element of a collection counts as.
const ELEMENT_SIZE: u64 = 64;

/// A function of the definition.
pub(crate) struct UserFunction<'a> {
    pub(crate) params: Vec<String>,
    pub(crate) variadic: Option<String>,
    pub(crate) result: Expr<'a>,
}

/// Variables of one expression: of `for`, of a matrix, or parameters of a function.
#[derive(Default)]
pub(crate) struct Scope<'p> {
    pub(crate) names: Vec<(String, Value)>,
    pub(crate) parent: Option<&'p Scope<'p>>,
}

impl Scope<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.names
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v)
            .or_else(|| self.parent.and_then(|p| p.get(name)))
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }
}

/// The blocks of a kind, as expressions see them.
pub(crate) struct Blocks {
    /// The attributes of a block that sets none.
    unset: &'static BTreeMap<String, Value>,
    /// Attributes that are set, by the names of the blocks.
    set: BTreeMap<String, BTreeMap<&'static str, Value>>,
}

impl Blocks {
    /// Makes the block `name` known, which sets nothing yet.
    pub(crate) fn begin(&mut self, name: &str) {
        if !self.set.contains_key(name) {
            let own = BTreeMap::from([("name", Value::string(name))]);
            self.set.insert(name.to_owned(), own);
        }
    }

    /// Notes what the block `name` sets, which has begun.
    pub(crate) fn set(&mut self, name: &str, attribute: &'static str, value: Value) {
        if let Some(own) = self.set.get_mut(name) {
            own.insert(attribute, value);
        }
    }

    /// The block `name` as a value.
    fn value(&self, name: &str) -> Option<Value> {
        let set = self.set.get(name)?.iter();
        let mut fields = self.unset.clone();
        fields.extend(set.map(|(attribute, value)| ((*attribute).to_owned(), value.clone())));
        Some(Value::object(fields))
    }

    /// All of them as a value.
    fn all(&self) -> Value {
        let named = |name: &String| Some((name.clone(), self.value(name)?));
        Value::object(self.set.keys().filter_map(named).collect())
    }
}

/// What is known by name, and how much was done.
pub(crate) struct Evaluator<'a> {
    pub(crate) host: &'a dyn Host,
    pub(crate) variables: RefCell<HashMap<String, Value>>,
    pub(crate) functions: RefCell<HashMap<String, Rc<UserFunction<'a>>>>,
    /// Attributes of blocks that were evaluated, by kind and name.
    blocks: RefCell<BTreeMap<&'static str, Blocks>>,
    depth: Cell<usize>,
    steps: Cell<u64>,
    size: Cell<u64>,
}

/// One level of depth, until it is dropped.
pub(crate) struct Level<'e>(&'e Cell<usize>);

impl Drop for Level<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl<'a> Evaluator<'a> {
    pub(crate) fn new(host: &'a dyn Host) -> Self {
        Self {
            host,
            variables: RefCell::default(),
            functions: RefCell::default(),
            blocks: RefCell::default(),
            depth: Cell::new(0),
            steps: Cell::new(0),
            size: Cell::new(0),
        }
    }

    /// Goes one level deeper.
    pub(crate) fn enter(&self) -> Outcome<Level<'_>> {
        if self.depth.get() >= MAX_DEPTH {
            return Err(Problem::plain(format!(
                "expressions, variables and functions are nested more than {MAX_DEPTH} levels deep"
            )));
        }
        self.depth.set(self.depth.get() + 1);
        Ok(Level(&self.depth))
    }

    /// Goes one level deeper until [`Self::ascend`].
    pub(crate) fn descend(&self) -> Outcome<()> {
        std::mem::forget(self.enter()?);
        Ok(())
    }

    /// Ends what [`Self::descend`] began.
    pub(crate) fn ascend(&self) {
        self.depth.set(self.depth.get().saturating_sub(1));
    }

    /// Changes what expressions see of the blocks of `kind`, which have `unset` where they set
    /// nothing.
    pub(crate) fn see(
        &self,
        kind: &'static str,
        unset: &'static BTreeMap<String, Value>,
        change: impl FnOnce(&mut Blocks),
    ) {
        let mut kinds = self.blocks.borrow_mut();
        change(kinds.entry(kind).or_insert_with(|| Blocks { unset, set: BTreeMap::new() }));
    }

    /// Notes what was made, and refuses what is too much.
    fn charge(&self, value: &Value) -> Outcome<()> {
        let size = match value {
            Value::String(text) => text.len() as u64,
            Value::Null(_) | Value::Bool(_) | Value::Number(_) => 0,
            _ => {
                if value.depth() > MAX_VALUE_DEPTH {
                    return Err(Problem::plain(format!(
                        "collections are nested more than {MAX_VALUE_DEPTH} levels deep"
                    )));
                }
                let sequence = value.sequence().map_or(0, |items| items.len());
                let mapping = value.mapping().map_or(0, |fields| fields.len());
                ELEMENT_SIZE * (sequence + mapping) as u64
            }
        };
        self.size.set(self.size.get().saturating_add(size));
        if self.size.get() > MAX_SIZE {
            return Err(Problem::plain("the definition makes values that are too large"));
        }
        Ok(())
    }

    /// The value of `expr`.
    pub(crate) fn value(&self, expr: Expr<'_>, scope: &Scope<'_>) -> Outcome<Value> {
        match expr {
            Expr::Hcl(expression, source) => self.expression(expression, source, scope),
            Expr::Json(json, source) => self.json(json, source, scope),
        }
    }

    fn json(&self, json: &Json, source: usize, scope: &Scope<'_>) -> Outcome<Value> {
        // The places in a template are not those in the file, which nobody has in JSON.
        let text = |text: &crate::json::Text| match &text.template {
            Ok(template) => self.template_value(template, source, scope).map_err(|mut p| {
                p.place = None;
                p
            }),
            Err(why) => Err(Problem::new("Invalid template", format!("{why} in {:?}", text.raw))),
        };
        let _level = self.enter()?;
        let value = match json {
            Json::Null => Value::NULL,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => Value::Number(n.ok_or_else(|| Problem::plain(number::RANGE))?),
            Json::Text(t) => text(t)?,
            Json::Array(list) => {
                let values = list.iter().map(|v| self.json(v, source, scope));
                Value::tuple(values.collect::<Outcome<_>>()?)
            }
            Json::Object(members) => {
                let mut fields = BTreeMap::new();
                for (name, value) in members {
                    let name = convert(&text(name)?, &Type::String)
                        .map_err(|e| Problem::new("Invalid object key expression", e))?;
                    let Some(name) = name.as_str() else {
                        return Err(Problem::new(
                            "Invalid object key expression",
                            "Cannot use null value as an object key.",
                        ));
                    };
                    fields.insert(name.to_owned(), self.json(value, source, scope)?);
                }
                Value::object(fields)
            }
        };
        self.charge(&value)?;
        Ok(value)
    }

    /// The value of `expression`, with its place if something is wrong with it.
    pub(crate) fn expression(
        &self,
        expression: &Expression,
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        let here = || place(expression, source);
        self.steps.set(self.steps.get() + 1);
        if self.steps.get() > MAX_STEPS {
            return Err(Problem::plain("the definition takes too long to evaluate").at(here()));
        }
        let _level = self.enter().map_err(|p| p.at(here()))?;
        let value = self.evaluate(expression, source, scope).map_err(|p| p.at(here()))?;
        self.charge(&value).map_err(|p| p.at(here()))?;
        Ok(value)
    }

    fn evaluate(
        &self,
        expression: &Expression,
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        let value = |e: &Expression| self.expression(e, source, scope);
        match expression {
            Expression::Null(_) => Ok(Value::NULL),
            Expression::Bool(b) => Ok(Value::Bool(*b.value())),
            Expression::Number(n) => {
                let written = n.as_repr().map(|r| r.to_string());
                let text = written.unwrap_or_else(|| n.value().to_string());
                let digits: String = text.chars().filter(|c| !c.is_whitespace()).collect();
                let number = Number::parse(&digits).ok_or_else(|| Problem::plain(number::RANGE))?;
                Ok(Value::Number(number))
            }
            Expression::String(s) => Ok(Value::string(s.as_str())),
            Expression::StringTemplate(template) => {
                self.elements_value(&template.iter().collect::<Vec<_>>(), source, scope)
            }
            Expression::HeredocTemplate(heredoc) => {
                self.template_value(&heredoc.template, source, scope)
            }
            Expression::Parenthesis(inner) => value(inner.inner()),
            Expression::Variable(name) => self.variable(name.as_str(), scope),
            Expression::Array(array) => {
                Ok(Value::tuple(array.iter().map(value).collect::<Outcome<_>>()?))
            }
            Expression::Object(object) => {
                let mut fields = BTreeMap::new();
                for (key, entry) in object.iter() {
                    let name = self.object_key(key, source, scope)?;
                    fields.insert(name, value(entry.expr())?);
                }
                Ok(Value::object(fields))
            }
            Expression::Conditional(c) => {
                // Also what is not chosen has a say in the type.
                let (yes, no) = (value(&c.true_expr), value(&c.false_expr));
                let condition = value(&c.cond_expr)?;
                let chosen =
                    condition_of(&condition).map_err(|p| p.at(place(&c.cond_expr, source)))?;
                let ty = match (&yes, &no) {
                    (Ok(yes), Ok(no)) => common_type(yes, no)?,
                    _ => Type::Dynamic,
                };
                convert(&if chosen { yes? } else { no? }, &ty).map_err(|e| {
                    Problem::new(
                        "Inconsistent conditional result types",
                        format!("The value of the chosen branch is unsuitable: {e}."),
                    )
                })
            }
            Expression::FuncCall(call) => self.call(call, source, scope),
            Expression::Traversal(traversal) => self.traversal(traversal, source, scope),
            Expression::UnaryOp(op) => {
                let operand = value(&op.expr)?;
                match op.operator.value() {
                    UnaryOperator::Neg => Ok(Value::Number(number_of(&operand)?.negate())),
                    UnaryOperator::Not => Ok(Value::Bool(!bool_of(&operand)?)),
                }
            }
            Expression::BinaryOp(op) => {
                let left = value(&op.lhs_expr)?;
                let operator = *op.operator.value();
                // The second operand of these is only asked where the first does not decide.
                match operator {
                    BinaryOperator::Or if matches!(left, Value::Bool(true)) => {
                        return Ok(Value::Bool(true));
                    }
                    BinaryOperator::And if matches!(left, Value::Bool(false)) => {
                        return Ok(Value::Bool(false));
                    }
                    _ => {}
                }
                binary(operator, &left, &value(&op.rhs_expr)?)
            }
            Expression::ForExpr(each) => self.for_expr(each, source, scope),
        }
    }

    fn variable(&self, name: &str, scope: &Scope<'_>) -> Outcome<Value> {
        if let Some(value) = scope.get(name) {
            return Ok(value.clone());
        }
        if let Some(value) = self.variables.borrow().get(name) {
            return Ok(value.clone());
        }
        if let Some(blocks) = self.blocks.borrow().get(name) {
            return Ok(blocks.all());
        }
        Err(Problem::new("Unknown variable", format!("There is no variable named {name:?}.")))
    }

    /// An identifier is its own name, unless it is in parentheses.
    fn object_key(&self, key: &ObjectKey, source: usize, scope: &Scope<'_>) -> Outcome<String> {
        let expression = match key {
            ObjectKey::Ident(name) => return Ok(name.as_str().to_owned()),
            ObjectKey::Expression(Expression::Bool(b)) => return Ok(b.value().to_string()),
            ObjectKey::Expression(Expression::Null(_)) => return Ok("null".into()),
            ObjectKey::Expression(e @ Expression::Traversal(t))
                if matches!(t.expr, Expression::Variable(_)) =>
            {
                return Err(Problem::new(
                    "Ambiguous attribute key",
                    "If this expression is intended to be a reference, wrap it in parentheses. If it's instead intended as a literal name containing periods, wrap it in quotes to create a string literal.",
                )
                .at(place(e, source)));
            }
            ObjectKey::Expression(e) => e,
        };
        let value = self.expression(expression, source, scope)?;
        let problem =
            |what: String| Problem::new("Incorrect key type", what).at(place(expression, source));
        if value.is_null() {
            return Err(Problem::new("Null value as key", "Can't use a null value as a key.")
                .at(place(expression, source)));
        }
        match convert(&value, &Type::String) {
            Ok(Value::String(name)) => Ok(name.to_string()),
            Ok(_) => Err(problem("Can't use this value as a key: string required.".into())),
            Err(e) => Err(problem(format!("Can't use this value as a key: {e}."))),
        }
    }

    fn traversal(&self, of: &Traversal, source: usize, scope: &Scope<'_>) -> Outcome<Value> {
        let operators: Vec<&TraversalOperator> = of.operators.iter().map(|o| o.value()).collect();
        // A block is found without looking at all others.
        if let Expression::Variable(root) = &of.expr
            && let Some(TraversalOperator::GetAttr(name)) = operators.first()
            && !scope.has(root.as_str())
            && !self.variables.borrow().contains_key(root.as_str())
        {
            let block = self
                .blocks
                .borrow()
                .get(root.as_str())
                .and_then(|blocks| blocks.value(name.as_str()));
            if let Some(block) = block {
                return self.follow(block, &operators[1..], source, scope);
            }
        }
        let root = self.expression(&of.expr, source, scope)?;
        self.follow(root, &operators, source, scope)
    }

    fn follow(
        &self,
        mut value: Value,
        operators: &[&TraversalOperator],
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        let mut rest = operators;
        while let Some((operator, more)) = rest.split_first() {
            rest = more;
            match operator {
                TraversalOperator::GetAttr(name) => value = attribute(&value, name.as_str())?,
                TraversalOperator::LegacyIndex(n) => {
                    let n = Number::whole(i128::from(*n.value()));
                    value = index(&value, &Value::Number(n))?;
                }
                TraversalOperator::Index(key) => {
                    let key = self.expression(key, source, scope)?;
                    value = index(&value, &key)?;
                }
                TraversalOperator::AttrSplat(_) => {
                    let simple = |o: &&&TraversalOperator| {
                        matches!(
                            o,
                            TraversalOperator::GetAttr(_) | TraversalOperator::LegacyIndex(_)
                        )
                    };
                    let own = rest.iter().take_while(simple).count();
                    value = self.splat(&value, &rest[..own], source, scope)?;
                    rest = &rest[own..];
                }
                TraversalOperator::FullSplat(_) => {
                    return self.splat(&value, rest, source, scope);
                }
            }
        }
        Ok(value)
    }

    fn splat(
        &self,
        value: &Value,
        each: &[&TraversalOperator],
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        let _level = self.enter()?;
        let Some(items) = value.sequence() else {
            return match value {
                Value::Null(Type::Tuple(_) | Type::List(_) | Type::Set(_)) => Err(Problem::new(
                    "Splat of null value",
                    "Splat expressions (with the * symbol) cannot be applied to null sequences.",
                )),
                Value::Null(_) => Ok(Value::tuple(Vec::new())),
                single => {
                    let one = self.follow(single.clone(), each, source, scope)?;
                    Ok(Value::tuple(vec![one]))
                }
            };
        };
        let values: Vec<Value> = items
            .iter()
            .map(|v| self.follow(v.clone(), each, source, scope))
            .collect::<Outcome<_>>()?;
        self.steps.set(self.steps.get().saturating_add(values.len() as u64));
        Ok(match value {
            Value::Tuple(_) => Value::tuple(values),
            _ => match values.first().map(Value::ty) {
                Some(ty) if values.iter().all(|v| v.ty() == ty) => Value::list(ty, values),
                Some(_) => Value::tuple(values),
                None => Value::list(Type::Dynamic, values),
            },
        })
    }

    fn call(&self, call: &FuncCall, source: usize, scope: &Scope<'_>) -> Outcome<Value> {
        let name = call.name.name.as_str();
        let at_name = || place(&call.name.name, source);
        if call.name.is_namespaced() {
            let namespace: String =
                call.name.namespace.iter().map(|n| format!("{}::", n.as_str())).collect();
            let why = format!("There are no functions in namespace {namespace:?}.");
            return Err(Problem::new("Call to unknown function", why).at(at_name()));
        }
        let args: Vec<&Expression> = call.args.iter().collect();
        match name {
            "try" | "can" | "convert" => {
                return self.special(name, &args, source, scope).map_err(|p| p.at(at_name()));
            }
            _ => {}
        }
        let user = self.functions.borrow().get(name).cloned();
        if user.is_none() && !functions::exists(name) {
            let mut known: Vec<String> = self.functions.borrow().keys().cloned().collect();
            known.extend(functions::names().map(str::to_owned));
            let near = shipway_fault::nearest(name, known.iter().map(String::as_str))
                .map_or(String::new(), |near| format!(" Did you mean {near:?}?"));
            let why = format!("There is no function named {name:?}.{near}");
            return Err(Problem::new("Call to unknown function", why).at(at_name()));
        }
        let mut values = Vec::new();
        let mut places: Vec<Option<SourceRange>> = Vec::new();
        for (n, arg) in args.iter().enumerate() {
            let value = self.expression(arg, source, scope)?;
            if call.args.expand_final() && n + 1 == args.len() {
                let Some(items) = value.sequence() else {
                    let why = match value.is_null() {
                        true => "The expanding argument (indicated by ...) must not be null.",
                        false => {
                            "The expanding argument (indicated by ...) must be of a tuple, list, or set type."
                        }
                    };
                    return Err(Problem::new("Invalid expanding argument value", why)
                        .at(place(*arg, source)));
                };
                for item in items.iter() {
                    values.push(item.clone());
                    places.push(place(*arg, source));
                }
            } else {
                values.push(value);
                places.push(place(*arg, source));
            }
        }
        match user {
            Some(function) => self.user_call(name, &function, values, &places),
            None => functions::call(self.host, name, &values).map_err(|error| {
                let place = error.argument.and_then(|n| places.get(n).cloned().flatten());
                error.into_problem(name).at(place.or_else(at_name))
            }),
        }
    }

    fn user_call(
        &self,
        name: &str,
        function: &UserFunction<'_>,
        mut values: Vec<Value>,
        places: &[Option<SourceRange>],
    ) -> Outcome<Value> {
        let wanted = function.params.len();
        if values.len() < wanted {
            let least = if function.variadic.is_some() { " at least" } else { "" };
            return Err(Problem::new(
                "Not enough function arguments",
                format!(
                    "Function {name:?} expects{least} {wanted} argument(s). Missing value for {:?}.",
                    function.params[values.len()]
                ),
            ));
        }
        if values.len() > wanted && function.variadic.is_none() {
            return Err(Problem::new(
                "Too many function arguments",
                format!("Function {name:?} expects only {wanted} argument(s)."),
            )
            .at(places.get(wanted).cloned().flatten()));
        }
        if let Some(n) = values.iter().position(Value::is_null) {
            let param = function.params.get(n).or(function.variadic.as_ref());
            return Err(Problem::new(
                "Invalid function argument",
                format!(
                    "Invalid value for {:?} parameter: argument must not be null.",
                    param.map_or("", String::as_str)
                ),
            )
            .at(places.get(n).cloned().flatten()));
        }
        let rest = values.split_off(wanted);
        let mut names: Vec<(String, Value)> = function.params.iter().cloned().zip(values).collect();
        if let Some(variadic) = &function.variadic {
            names.push((variadic.clone(), Value::tuple(rest)));
        }
        // What is wrong in the function is shown there, and called by its name.
        self.value(function.result, &Scope { names, parent: None })
    }

    /// Functions that look at expressions, not at values.
    fn special(
        &self,
        name: &str,
        args: &[&Expression],
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        let failed = |why: &str| {
            Problem::new(
                "Error in function call",
                format!("Call to function {name:?} failed: {why}."),
            )
        };
        match (name, args) {
            ("can", [expression]) => {
                Ok(Value::Bool(self.expression(expression, source, scope).is_ok()))
            }
            ("convert", [expression, ty]) => {
                let ty = types::constraint(Expr::Hcl(ty, source))?;
                let value = self.expression(expression, source, scope)?;
                convert(&value, &ty).map_err(|e| failed(&e))
            }
            ("try", []) => Err(failed("at least one argument is required")),
            ("try", all) => {
                let mut last = None;
                for expression in all {
                    match self.expression(expression, source, scope) {
                        Ok(value) => return Ok(value),
                        Err(problem) => last = Some(problem),
                    }
                }
                let why = last.map_or(String::new(), |p| p.text);
                Err(failed(&format!("no expression succeeded: {why}")))
            }
            _ => Err(failed("wrong number of arguments")),
        }
    }

    fn for_expr(&self, each: &ForExpr, source: usize, scope: &Scope<'_>) -> Outcome<Value> {
        let collection = self.expression(&each.intro.collection_expr, source, scope)?;
        let at = || place(&each.intro.collection_expr, source);
        let entries = entries(&collection).map_err(|p| p.at(at()))?;
        let key_name = each.intro.key_var.as_ref().map(|k| k.as_str());
        let value_name = each.intro.value_var.as_str();
        let mut list = Vec::new();
        let mut fields: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for (key, value) in entries {
            let mut names = vec![(value_name.to_owned(), value)];
            if let Some(name) = key_name {
                names.insert(0, (name.to_owned(), key));
            }
            let scope = Scope { names, parent: Some(scope) };
            if let Some(condition) = &each.cond {
                let at = || place(&condition.expr, source);
                let wanted = self.expression(&condition.expr, source, &scope)?;
                if wanted.is_null() {
                    return Err(Problem::new(
                        "Condition is null",
                        "The value of the 'if' clause must not be null.",
                    )
                    .at(at()));
                }
                let wanted = convert(&wanted, &Type::Bool).map_err(|e| {
                    Problem::new(
                        "Invalid 'for' condition",
                        format!("The 'if' clause value is invalid: {e}."),
                    )
                    .at(at())
                })?;
                if wanted != Value::Bool(true) {
                    continue;
                }
            }
            let Some(key) = &each.key_expr else {
                list.push(self.expression(&each.value_expr, source, &scope)?);
                continue;
            };
            let at = || place(key, source);
            let name = self.expression(key, source, &scope)?;
            if name.is_null() {
                return Err(Problem::new(
                    "Invalid object key",
                    "Key expression in 'for' expression must not produce a null value.",
                )
                .at(at()));
            }
            let name = match convert(&name, &Type::String) {
                Ok(Value::String(name)) => name.to_string(),
                Ok(_) => return Err(Problem::new("Invalid object key", "string required").at(at())),
                Err(e) => {
                    let why = format!("The key expression produced an invalid result: {e}.");
                    return Err(Problem::new("Invalid object key", why).at(at()));
                }
            };
            let value = self.expression(&each.value_expr, source, &scope)?;
            let values = fields.entry(name.clone()).or_default();
            if !values.is_empty() && !each.grouping {
                return Err(Problem::new(
                    "Duplicate object key",
                    format!(
                        "Two different items produced the key {name:?} in this 'for' expression. If duplicates are expected, use the ellipsis (...) after the value expression to enable grouping by key."
                    ),
                )
                .at(at()));
            }
            values.push(value);
        }
        if each.key_expr.is_none() {
            return Ok(Value::tuple(list));
        }
        let object = fields.into_iter().map(|(name, mut values)| match each.grouping {
            true => (name, Value::tuple(values)),
            false => (name, values.pop().unwrap_or(Value::NULL)),
        });
        Ok(Value::object(object.collect()))
    }

    fn template_value(
        &self,
        template: &Template,
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        self.elements_value(&template.iter().collect::<Vec<_>>(), source, scope)
    }

    /// One interpolation alone is the value itself, whatever its type.
    fn elements_value(
        &self,
        elements: &[&Element],
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<Value> {
        if let [Element::Interpolation(only)] = elements {
            return self.expression(&only.expr, source, scope);
        }
        let text = self.text(elements, (false, false), source, scope)?;
        Ok(Value::string(text))
    }

    /// The text of a template, without the blanks at its ends that its surroundings strip.
    fn text(
        &self,
        elements: &[&Element],
        strip: (bool, bool),
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<String> {
        let _level = self.enter()?;
        let mut out = String::new();
        for (n, element) in elements.iter().enumerate() {
            match element {
                Element::Literal(literal) => {
                    let before = n.checked_sub(1).map_or(strip.0, |n| strips_after(elements[n]));
                    let after = elements.get(n + 1).map_or(strip.1, |e| strips_before(e));
                    let mut text = literal.as_str();
                    if before {
                        text = text.trim_start();
                    }
                    if after {
                        text = text.trim_end();
                    }
                    out.push_str(text);
                }
                Element::Interpolation(of) => {
                    let value = self.expression(&of.expr, source, scope)?;
                    out.push_str(&interpolated(&value).map_err(|p| p.at(place(&of.expr, source)))?);
                }
                Element::Directive(directive) => {
                    out.push_str(&self.directive(directive, source, scope)?);
                }
            }
            if out.len() as u64 > MAX_SIZE {
                return Err(Problem::plain("the definition makes values that are too large"));
            }
        }
        Ok(out)
    }

    fn directive(
        &self,
        directive: &Directive,
        source: usize,
        scope: &Scope<'_>,
    ) -> Outcome<String> {
        let part = |template: &Template, before: Strip, after: Strip, scope: &Scope<'_>| {
            let elements: Vec<&Element> = template.iter().collect();
            self.text(&elements, (before.strip_end(), after.strip_start()), source, scope)
        };
        match directive {
            Directive::If(of) => {
                let condition = self.expression(&of.if_expr.cond_expr, source, scope)?;
                let chosen = condition_of(&condition)
                    .map_err(|p| p.at(place(&of.if_expr.cond_expr, source)))?;
                let end = of.endif_expr.strip;
                match (&of.else_expr, chosen) {
                    (Some(other), true) => {
                        part(&of.if_expr.template, of.if_expr.strip, other.strip, scope)
                    }
                    (None, true) => part(&of.if_expr.template, of.if_expr.strip, end, scope),
                    (Some(other), false) => part(&other.template, other.strip, end, scope),
                    (None, false) => Ok(String::new()),
                }
            }
            Directive::For(of) => {
                let each = &of.for_expr;
                let collection = self.expression(&each.collection_expr, source, scope)?;
                let entries =
                    entries(&collection).map_err(|p| p.at(place(&each.collection_expr, source)))?;
                let mut out = String::new();
                for (key, value) in entries {
                    let mut names = vec![(each.value_var.as_str().to_owned(), value)];
                    if let Some(name) = &each.key_var {
                        names.insert(0, (name.as_str().to_owned(), key));
                    }
                    let scope = Scope { names, parent: Some(scope) };
                    out.push_str(&part(&each.template, each.strip, of.endfor_expr.strip, &scope)?);
                }
                Ok(out)
            }
        }
    }
}

/// Whether blanks before an element are stripped.
fn strips_before(element: &Element) -> bool {
    match element {
        Element::Literal(_) => false,
        Element::Interpolation(i) => i.strip.strip_start(),
        Element::Directive(d) => match &**d {
            Directive::If(d) => d.if_expr.strip.strip_start(),
            Directive::For(d) => d.for_expr.strip.strip_start(),
        },
    }
}

/// Whether blanks behind an element are stripped.
fn strips_after(element: &Element) -> bool {
    match element {
        Element::Literal(_) => false,
        Element::Interpolation(i) => i.strip.strip_end(),
        Element::Directive(d) => match &**d {
            Directive::If(d) => d.endif_expr.strip.strip_end(),
            Directive::For(d) => d.endfor_expr.strip.strip_end(),
        },
    }
}

fn interpolated(value: &Value) -> Outcome<String> {
    const HEADING: &str = "Invalid template interpolation value";
    if value.is_null() {
        return Err(Problem::new(
            HEADING,
            "The expression result is null. Cannot include a null value in a string template.",
        ));
    }
    match convert(value, &Type::String) {
        Ok(Value::String(text)) => Ok(text.to_string()),
        Ok(_) => Err(Problem::new(HEADING, "string required")),
        Err(e) => Err(Problem::new(
            HEADING,
            format!("Cannot include the given value in a string template: {e}."),
        )),
    }
}

fn condition_of(value: &Value) -> Outcome<bool> {
    if value.is_null() {
        return Err(Problem::new(
            "Null condition",
            "The condition value is null. Conditions must either be true or false.",
        ));
    }
    match convert(value, &Type::Bool) {
        Ok(Value::Bool(b)) => Ok(b),
        Ok(_) => Err(Problem::new("Incorrect condition type", "bool required")),
        Err(e) => Err(Problem::new(
            "Incorrect condition type",
            format!("The condition expression must be of type bool: {e}."),
        )),
    }
}

/// The type of both branches of a condition.
fn common_type(yes: &Value, no: &Value) -> Outcome<Type> {
    if *yes == Value::NULL {
        return Ok(no.ty());
    }
    if *no == Value::NULL {
        return Ok(yes.ty());
    }
    unify(&[yes.ty(), no.ty()], true).ok_or_else(|| {
        Problem::new(
            "Inconsistent conditional result types",
            format!(
                "The true and false result expressions must have consistent types. The 'true' value is {}, but the 'false' value is {}.",
                yes.ty(),
                no.ty()
            ),
        )
    })
}
